"""Plans keep their promises for random tables; layouts and the way back are checked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.config.trainer import TrainerConfig
from megatron_mmrl.trainer.packing import InputRules, Packer, build_batch, build_microbatch, split_minibatches, unpack
from megatron_mmrl.trainer.plan import Multiples, Plan, plan_microbatches
from megatron_mmrl.types import MicroBatch, TrainSequence

IMAGE, PAD = 99, 0


def count_positions(ids: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Stands for mrope: rows t, h, w that can be told apart, and from plain counting."""
    return np.stack([np.arange(len(ids)) + 100 * row for row in (1, 2, 3)])


RULES = InputRules(position_ids=count_positions, pad_id=PAD, image_token_id=IMAGE, merge_size=2)


def sequence(ids: list[int], num_prompt: int = 1, advantage: float = 1.0, images: int = 0) -> TrainSequence:
    mask = np.arange(len(ids)) >= num_prompt
    return TrainSequence(
        ids=np.array(ids, dtype=np.int64),
        loss_mask=mask,
        advantages=np.where(mask, advantage, 0).astype(np.float32),
        rollout_logprobs=np.where(mask, -np.arange(len(ids)), 0).astype(np.float32),
        pixel_values=np.full((4 * images, 6), ids[0], dtype=np.float32),
        image_grid_thw=np.tile(np.array([[1, 2, 2]]), (images, 1)),
    )


def lay_out(sequences: list[TrainSequence], indices: list[int], num_tokens: int, num_rows: int | None) -> MicroBatch:
    lengths = tuple(len(sequence.ids) for sequence in sequences)
    plan = Plan(lengths=lengths, microbatches=((tuple(indices),),), num_tokens=num_tokens, num_rows=num_rows)
    return build_microbatch(sequences, indices, plan, RULES)


def check_plan(plan: Plan, lengths: list[int], table: dict) -> None:
    replicas, budget, most = table["num_replicas"], table["max_tokens"], table["max_sequences"]
    assert len(plan.microbatches) == replicas
    multiples = table["multiples"]
    (num_microbatches,) = {len(replica) for replica in plan.microbatches}
    assert num_microbatches % multiples.microbatches == 0
    bins = [indices for replica in plan.microbatches for indices in replica]
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
    assert plan.num_tokens <= budget
    rows = plan.num_rows or 1
    assert plan.num_tokens % (rows * multiples.tokens) == 0
    for indices in bins:
        assert most is None or len(indices) <= most
        if plan.num_rows is None:
            assert plan.slots(indices) == [-(-lengths[index] // multiples.slot) * multiples.slot for index in indices]
            assert sum(plan.slots(indices)) <= plan.num_tokens
        else:
            assert len(indices) <= rows
            assert all(lengths[index] <= plan.num_tokens // rows for index in indices)


@pytest.mark.parametrize("packing", [True, False])
def test_random_plans_hold_every_promise(packing: bool):
    rng = np.random.default_rng(0)
    for _ in range(150):
        slot, tensor = int(rng.choice([1, 1, 4, 6])), int(rng.choice([1, 2, 3]))
        multiples = Multiples(tokens=slot * tensor, slot=slot, microbatches=int(rng.choice([1, 1, 2, 3])))
        budget = int(rng.integers(32, 512))
        lengths = rng.integers(1, budget - slot * tensor, size=int(rng.integers(1, 60))).tolist()
        table = {
            "num_replicas": int(rng.integers(1, 6)),
            "max_tokens": budget,
            "max_sequences": None if rng.random() < 0.5 else int(rng.integers(1, 5)),
            "multiples": multiples,
        }
        plan = plan_microbatches(lengths, packing=packing, **table)
        check_plan(plan, lengths, table)
        assert plan == plan_microbatches(lengths, packing=packing, **table)


def test_fewest_micro_batches_and_then_the_shortest():
    # 12 tokens in bins of at most 8: two bins, and 6 tokens each are enough
    plan = plan_microbatches([4, 2, 3, 3], num_replicas=1, max_tokens=8, max_sequences=None, packing=True)
    assert plan.microbatches == (((0, 1), (2, 3)),) or plan.microbatches == (((2, 3), (0, 1)),)
    assert plan.num_tokens == 6
    assert plan.utilisation == 1.0


def test_first_fit_fills_what_spreading_evenly_cannot():
    # 5+3, 4+4: level filling would put 4+3 and 5+4 = 9 > 8
    plan = plan_microbatches([5, 4, 4, 3], num_replicas=1, max_tokens=8, max_sequences=None, packing=True)
    assert sorted(plan.microbatches[0]) == [(0, 3), (1, 2)]


def test_replicas_without_a_sequence_read_a_dummy():
    plan = plan_microbatches(
        [5], num_replicas=2, max_tokens=16, max_sequences=None, packing=True, multiples=Multiples(tokens=4)
    )
    assert sorted(plan.microbatches) == [((),), ((0,),)]
    for packed in (plan, plan_microbatches([5], num_replicas=2, max_tokens=16, max_sequences=None, packing=False)):
        idle = packed.microbatches.index(((),))
        batch = build_batch([sequence([1, 2, 3, 4, 5])], packed, idle, RULES)
        (micro,) = batch.microbatches
        assert micro.cu_seqlens.tolist() == [0, packed.num_tokens]
        assert micro.input_ids.tolist() == [PAD] * packed.num_tokens
        assert not micro.loss_mask.any()
        assert micro.pixel_values.shape == (0, 6)
        assert micro.image_grid_thw.shape == (0, 3)
        assert (batch.num_loss_tokens, batch.num_sequences) == (4, 1)  # global, also where nothing is read


def test_attention_work_is_dealt_evenly():
    # four bins of 8 tokens: 8, 8, 2+2+2+2, 2+2+2+2; each replica gets a long and a chopped one
    plan = plan_microbatches([8, 8] + [2] * 8, num_replicas=2, max_tokens=8, max_sequences=None, packing=True)
    assert [sorted(map(len, replica)) for replica in plan.microbatches] == [[1, 4], [1, 4]]


def test_impossible_plans_name_both_numbers():
    with pytest.raises(ValueError, match=r"sequence 1 has 11 tokens but a micro-batch holds 8 .*=10"):
        plan_microbatches(
            [3, 11], num_replicas=1, max_tokens=10, max_sequences=None, packing=True, multiples=Multiples(tokens=4)
        )
    with pytest.raises(ValueError, match="no sequences"):
        plan_microbatches([], num_replicas=1, max_tokens=8, max_sequences=None, packing=True)


@pytest.mark.parametrize(("scale", "budget", "least"), [(1700, 8192, 0.98), (60, 1024, 0.98), (1200, 4096, 0.97)])
def test_long_tailed_lengths_are_packed_tightly(scale: int, budget: int, least: float):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(scale), 0.5, 1024), 16, budget).astype(int).tolist()
    plan = plan_microbatches(
        lengths, num_replicas=8, max_tokens=budget, max_sequences=None, packing=True, multiples=Multiples(tokens=8)
    )
    assert plan.utilisation >= least
    work = [
        sum(lengths[i] ** 2 for indices in replica for i in indices)
        + sum((plan.num_tokens - sum(lengths[i] for i in indices)) ** 2 for indices in replica)
        for replica in plan.microbatches
    ]
    assert max(work) / np.mean(work) <= 1.05


def test_packed_layout_by_hand():
    sequences = [sequence([1, 2, 3], advantage=2.0), sequence([4, IMAGE, 5], num_prompt=2, images=1)]
    micro = lay_out(sequences, [1, 0], num_tokens=8, num_rows=None)
    assert micro.input_ids.tolist() == [4, IMAGE, 5, 1, 2, 3, PAD, PAD]
    assert micro.cu_seqlens.tolist() == [0, 3, 6, 8]
    assert micro.cu_seqlens.dtype == np.int32
    assert micro.loss_mask.tolist() == [False, False, True, False, True, True, False, False]
    assert micro.advantages.tolist() == [0, 0, 1, 0, 2, 2, 0, 0]
    assert micro.rollout_logprobs.tolist() == [0, 0, -2, 0, -1, -2, 0, 0]
    assert micro.position_ids.tolist() == [
        [100, 101, 102, 100, 101, 102, 0, 1],
        [200, 201, 202, 200, 201, 202, 0, 1],
        [300, 301, 302, 300, 301, 302, 0, 1],
    ]
    assert micro.pixel_values.tolist() == [[4.0] * 6] * 4
    assert micro.image_grid_thw.tolist() == [[1, 2, 2]]
    assert (micro.old_logprobs, micro.ref_logprobs, micro.num_rows) == (None, None, None)


def test_slots_that_context_ranks_can_divide_by_hand():
    sequences = [sequence([1, 2, 3]), sequence([4, 5, 6, 7, 8])]
    plan = plan_microbatches(
        [3, 5], num_replicas=1, max_tokens=32, max_sequences=None, packing=True, multiples=Multiples(tokens=8, slot=4)
    )
    assert plan.num_tokens == 16  # slots of 4 and 8, and 4 of padding
    (micro,) = build_batch(sequences, plan, 0, RULES).microbatches
    assert micro.input_ids.tolist() == [1, 2, 3, PAD, 4, 5, 6, 7, 8, PAD, PAD, PAD, PAD, PAD, PAD, PAD]
    assert micro.cu_seqlens.tolist() == [0, 4, 12, 16]
    assert micro.position_ids[0].tolist() == [100, 101, 102, 3, 100, 101, 102, 103, 104, 5, 6, 7, 0, 1, 2, 3]
    assert micro.loss_mask.nonzero()[0].tolist() == [1, 2, 5, 6, 7, 8]
    back = unpack([np.arange(16, dtype=np.float32)], plan, 0)
    assert {index: values.tolist() for index, values in back.items()} == {0: [0, 1, 2], 1: [4, 5, 6, 7, 8]}


def test_interleaved_stages_get_a_multiple_of_micro_batches():
    # one micro-batch would hold all 9 tokens; a pipeline of 4 stages gets 4, the longest as short as possible
    plan = plan_microbatches(
        [4, 3, 2], num_replicas=1, max_tokens=16, max_sequences=None, packing=True, multiples=Multiples(microbatches=4)
    )
    assert sorted(plan.microbatches[0]) == [(), (0,), (1,), (2,)]
    assert plan.num_tokens == 4


def test_multiples_of_parallel_sizes():
    def of(**sizes: int | bool) -> Multiples:
        return Multiples.of(ParallelConfig(**sizes))

    assert of() == Multiples()
    assert of(tensor_model_parallel_size=4) == Multiples(tokens=4)
    assert of(tensor_model_parallel_size=4, sequence_parallel=False) == Multiples()
    assert of(tensor_model_parallel_size=2, context_parallel_size=3) == Multiples(tokens=12, slot=6)
    assert of(pipeline_model_parallel_size=3) == Multiples()
    assert of(pipeline_model_parallel_size=3, virtual_pipeline_model_parallel_size=2) == Multiples(microbatches=3)


def test_a_full_pack_has_no_dummy():
    micro = lay_out([sequence([1, 2, 3])], [0], num_tokens=3, num_rows=None)
    assert micro.cu_seqlens.tolist() == [0, 3]


def test_padded_layout_by_hand():
    sequences = [sequence([1, 2, 3]), sequence([4, 5])]
    micro = lay_out(sequences, [0, 1], num_tokens=12, num_rows=3)
    assert micro.input_ids.reshape(3, 4).tolist() == [[1, 2, 3, PAD], [4, 5, PAD, PAD], [PAD] * 4]
    assert micro.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert micro.position_ids[0].reshape(3, 4).tolist() == [[100, 101, 102, 3], [100, 101, 2, 3], [0, 1, 2, 3]]
    assert micro.loss_mask.reshape(3, 4).tolist() == [
        [False, True, True, False],
        [False, True, False, False],
        [False] * 4,
    ]


def test_old_and_reference_logprobs_travel_with_all_sequences_or_none():
    plain, other = sequence([1, 2]), sequence([3, 4, 5])
    with_old = replace(plain, old_logprobs=np.array([0, -7], np.float32))
    micro = lay_out([with_old], [0], num_tokens=3, num_rows=None)
    assert micro.old_logprobs.tolist() == [0, -7, 0]
    assert micro.ref_logprobs is None
    with pytest.raises(ValueError, match="1 of 2 sequences carry old_logprobs"):
        lay_out([with_old, other], [0, 1], num_tokens=8, num_rows=None)


def test_images_that_do_not_match_their_tokens_are_refused():
    def build(bad: TrainSequence) -> None:
        lay_out([sequence([1, 2]), bad], [0, 1], num_tokens=8, num_rows=None)

    good = sequence([4, IMAGE, 5], num_prompt=2, images=1)
    build(good)
    with pytest.raises(ValueError, match=r"sequence 1 has 2 image tokens but .* make 1"):
        build(replace(good, ids=np.array([4, IMAGE, IMAGE])))  # the policy drew an image token
    with pytest.raises(ValueError, match=r"sequence 1 has 3 rows of pixels but .* make 4"):
        build(replace(good, pixel_values=good.pixel_values[:3]))
    with pytest.raises(ValueError, match="pad_id=99 is the image token"):
        replace(RULES, pad_id=IMAGE)


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_spread_over_replicas_comes_back(packing: bool):
    rng = np.random.default_rng(1)
    sequences = [sequence(rng.integers(1, 50, size=int(rng.integers(2, 20))).tolist()) for _ in range(23)]
    config = TrainerConfig(micro_batch_tokens=48, packing=packing)
    found: dict[int, np.ndarray] = {}
    loss_tokens = 0
    for replica in range(3):
        packer = Packer(
            trainer=config,
            num_replicas=3,
            replica=replica,
            multiples=Multiples(tokens=8, slot=4, microbatches=2),
            rules=RULES,
            speaks_for_replica=True,
        )
        packed = packer.pack(sequences)
        share = packed.unpack([micro.rollout_logprobs for micro in packed.batch.microbatches])
        assert not share.keys() & found.keys()
        found |= share
        loss_tokens += sum(int(micro.loss_mask.sum()) for micro in packed.batch.microbatches)
    assert packed.batch.num_loss_tokens == loss_tokens == sum(len(s.ids) - 1 for s in sequences)
    assert sorted(found) == list(range(23))
    for index, values in found.items():
        assert values.tolist() == sequences[index].rollout_logprobs.tolist()


def test_values_and_sequences_of_another_plan_are_refused():
    plan = plan_microbatches([3, 4], num_replicas=1, max_tokens=8, max_sequences=None, packing=True)
    with pytest.raises(ValueError, match="2 arrays of values but replica 0 has 1"):
        unpack([np.zeros(7), np.zeros(7)], plan, 0)
    with pytest.raises(ValueError, match=r"shape \(5,\) but micro-batches have 7 tokens"):
        unpack([np.zeros(5)], plan, 0)
    with pytest.raises(ValueError, match="made for 2 sequences of 7 tokens, got 1 of 3"):
        build_batch([sequence([1, 2, 3])], plan, 0, RULES)


def test_only_sequences_with_loss_tokens_count():
    sequences = [sequence([1, 2, 3]), sequence([4, 5], num_prompt=2)]
    plan = plan_microbatches([3, 2], num_replicas=1, max_tokens=8, max_sequences=None, packing=True)
    batch = build_batch(sequences, plan, 0, RULES)
    assert (batch.num_loss_tokens, batch.num_sequences) == (2, 1)


def test_mini_batches_keep_order_and_differ_by_at_most_one():
    assert split_minibatches(list("abcdefghij"), 4) == [list("abcd"), list("efg"), list("hij")]
    assert split_minibatches([1, 2, 3], None) == [[1, 2, 3]]
    assert split_minibatches([], 4) == []
    shuffled = split_minibatches(list(range(10)), 5, np.random.default_rng(0))
    assert shuffled == split_minibatches(list(range(10)), 5, np.random.default_rng(0))
    assert shuffled[0] != [0, 1, 2, 3, 4]
    assert sorted(shuffled[0] + shuffled[1]) == list(range(10))
