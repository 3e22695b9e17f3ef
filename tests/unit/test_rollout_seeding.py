"""Seeded draws: a pure function of (seed, position), with the right distribution."""

from __future__ import annotations

import pytest
import torch

from megatron_mmrl.rollout.seeded_noise import _GAMMA, _mix, draw_tokens, gumbel_noise
from megatron_mmrl.rollout.seeding import prompt_seed


def test_mixing_is_splitmix64():
    # The first outputs of the reference generator started with 1234567.
    state = 1234567 + torch.tensor([1, 2, 3]) * _GAMMA
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [value % (1 << 64) for value in _mix(state).tolist()] == expected


def test_a_row_depends_on_its_own_seed_and_position_only():
    seeds, positions = torch.tensor([5, 6, 5]), torch.tensor([3, 3, 4])
    noise = gumbel_noise(seeds, positions, 50)
    assert torch.equal(noise[1], gumbel_noise(seeds[1:2], positions[1:2], 50)[0])
    assert torch.equal(noise[0, :20], gumbel_noise(seeds[:1], positions[:1], 20)[0])
    assert not torch.equal(noise[0], noise[1])  # another seed
    assert not torch.equal(noise[0], noise[2])  # another position


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(torch.arange(100), torch.full((100,), 7), 1000)
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)  # Euler's constant
    assert noise.std().item() == pytest.approx(1.28255, abs=0.01)  # pi / sqrt(6)


def test_neighbouring_rows_and_columns_are_not_correlated():
    noise = gumbel_noise(torch.arange(300), torch.zeros(300, dtype=torch.int64), 300)
    noise = (noise - noise.mean()) / noise.std()
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.01
    assert (noise[:, 1:] * noise[:, :-1]).mean().abs() < 0.01


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
    draws = draw_tokens(
        probabilities.log().expand(20_000, -1), torch.arange(20_000), torch.full((20_000,), 11)
    ).flatten()
    frequencies = torch.bincount(draws, minlength=5) / 20_000
    assert (frequencies - probabilities).abs().max() < 0.01
    assert frequencies[4] == 0  # log 0: impossible


def test_prompt_seeds_differ_in_every_argument_and_leave_room_for_samples():
    seeds = {
        prompt_seed(run_seed, step, prompt)
        for run_seed in (0, 1)
        for step in (0, 1, 11)
        for prompt in ("a:1", "a:11", "1")
    }
    assert len(seeds) == 18
    assert all(0 <= seed < 1 << 62 and seed % (1 << 16) == 0 for seed in seeds)
    assert prompt_seed(3, 4, "a:1") == 1335424053233713152  # runs of today must be repeatable tomorrow
