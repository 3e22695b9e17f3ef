"""MathVerse (``AI4Math/MathVerse``): a geometry question in six versions that leave ever more to the image."""

from __future__ import annotations

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats.choices import options_in
from megatron_mmrl.data.formats.row import ReadImage, Row, answer_text, build_prompt, other_columns
from megatron_mmrl.types import IMAGE_TAG, Message, Prompt


def read_mathverse(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """``{sample_index, problem_index, problem_version, question, image, answer, question_type, metadata, query_wo,
    query_cot, question_for_eval}``.

    The model is asked ``query_cot``, which the version "Vision Only" has too (its question is in the image alone), or
    ``question`` where that column is missing. Options are taken from ``question_for_eval``, which always has them.
    ``metadata.subject`` and ``metadata.subfield`` become ``meta["subject"]`` and ``meta["subfield"]``.

    Raises:
        BadRowError: no question or answer, an image that ``read_image`` refuses.
    """
    text = row.get("query_cot") or row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise BadRowError("query_cot and question are missing or blank")
    images = [read_image(row["image"])] if row.get("image") not in (None, "") else []
    meta = other_columns(row, ("image", "answer", "query_cot", "query_wo", "question"))
    metadata = meta.get("metadata")
    if isinstance(metadata, dict):
        meta |= {key: metadata[key] for key in ("subject", "subfield") if key in metadata}
    meta["question_id"] = meta.get("sample_index", prompt_id)
    choices = options_in(str(row.get("question_for_eval") or row.get("question") or ""))
    if choices:
        meta["choices"] = choices
    return build_prompt(
        prompt_id,
        source="mathverse",
        messages=(Message(role="user", text=IMAGE_TAG * len(images) + text),),
        images=images,
        answer=answer_text(row.get("answer"), "answer"),
        meta=meta,
    )
