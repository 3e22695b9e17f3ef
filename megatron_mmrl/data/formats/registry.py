"""``data.format`` -> the function that reads a row. A new format is a file here and a line below."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mmrl.data.formats.mathverse import read_mathverse
from megatron_mmrl.data.formats.mm_eureka import read_mm_eureka
from megatron_mmrl.data.formats.olympiad_bench import read_olympiad_bench
from megatron_mmrl.data.formats.questions import (
    read_clevr_cogen,
    read_geometry3k,
    read_geoqa_r1v,
    read_mathvision,
    read_mathvista,
    read_mmk12,
    read_open_r1,
    read_polymath,
    read_scemqa,
    read_wemath,
)
from megatron_mmrl.data.formats.row import ReadRow
from megatron_mmrl.data.formats.swift import read_swift
from megatron_mmrl.data.formats.text_sets import read_aime24, read_gpqa, read_math500
from megatron_mmrl.data.formats.verl import read_verl

FORMATS: Mapping[str, ReadRow] = {
    "verl": read_verl,
    "mm_eureka": read_mm_eureka,
    "swift": read_swift,
    "geometry3k": read_geometry3k,
    "geoqa_r1v": read_geoqa_r1v,
    "clevr_cogen": read_clevr_cogen,
    "open_r1": read_open_r1,
    "mmk12": read_mmk12,
    "mathvista": read_mathvista,
    "mathvision": read_mathvision,
    "polymath": read_polymath,
    "scemqa": read_scemqa,
    "wemath": read_wemath,
    "mathverse": read_mathverse,
    "olympiad_bench": read_olympiad_bench,
    "aime24": read_aime24,
    "math500": read_math500,
    "gpqa_diamond": read_gpqa,
}
