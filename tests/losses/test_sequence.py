"""The gradient on the student's own samples against every sequence of a small world, in float64."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import flexalign.losses.sequence
from flexalign.errors import ConfigError
from flexalign.heads import Head
from flexalign.losses import fused_divergence
from flexalign.losses.sequence import sampled_score
from flexalign.losses.teacher import FusedTeacher
from twin import fuse64

VOCAB, LONGEST, WIDTH = 3, 3, 4
END = 0


class World(NamedTuple):
    """Three models over prefixes: a hidden state for each prefix, and one head each."""

    prefixes: list[tuple[int, ...]]
    hidden: dict[str, Tensor]
    heads: dict[str, Tensor]

    def log_probabilities(self, who: str) -> Tensor:
        return torch.log_softmax(self.hidden[who] @ self.heads[who].T, -1)


@pytest.fixture
def world() -> World:
    prefixes = [
        prefix
        for length in range(LONGEST)
        for prefix in itertools.product(range(1, VOCAB), repeat=length)
    ]
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    names = ("student", "reference", "aligned")
    hidden = {name: draw(len(prefixes), WIDTH) for name in names}
    heads = {name: draw(VOCAB, WIDTH) for name in names}
    # a pair that differs much at some prefixes and little at others, for the gate
    heads["aligned"] = heads["reference"].clone()
    hidden["aligned"] = hidden["reference"] + torch.cat([draw(4, WIDTH), 0.01 * draw(3, WIDTH)])
    for tensor in (hidden["student"], heads["student"]):
        tensor.requires_grad_(True)
    return World(prefixes, hidden, heads)


def sequences() -> list[tuple[int, ...]]:
    """All that can be written: up to the end token, or cut off."""
    going_on = range(1, VOCAB)
    ended = [
        (*start, END)
        for length in range(LONGEST)
        for start in itertools.product(going_on, repeat=length)
    ]
    return ended + list(itertools.product(going_on, repeat=LONGEST))


def log_probability(world: World, table: Tensor, sequence: tuple[int, ...]) -> Tensor:
    return sum(
        table[world.prefixes.index(sequence[:place]), token] for place, token in enumerate(sequence)
    )


def gradients(loss: Tensor, world: World) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [world.hidden["student"], world.heads["student"]]))


def as_batch(world: World, batch: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Prefixes, tokens and mask of some samples; each row has one position of a prompt."""
    rows = torch.zeros(len(batch), LONGEST + 1, dtype=torch.long)
    tokens, mask = rows.clone(), torch.zeros_like(rows, dtype=torch.bool)
    for row, sequence in enumerate(batch):
        for place, token in enumerate(sequence):
            rows[row, place + 1] = world.prefixes.index(sequence[:place])
            tokens[row, place + 1], mask[row, place + 1] = token, True
    return rows, tokens, mask


def sampled_loss(
    world: World,
    batch: list[tuple[int, ...]],
    lam: float | Tensor,
    gate: float | None,
    chunk_size: int = 2,
    objective: str = "sequence",
) -> Tensor:
    """The loss of the library on a batch of samples."""
    rows, tokens, mask = as_batch(world, batch)
    sides = [
        part
        for who in ("student", "reference", "aligned")
        for part in (world.hidden[who][rows], world.heads[who])
    ]
    return fused_divergence(
        *sides,
        mask,
        lam,
        gate=gate,
        num_items=1,
        chunk_size=chunk_size,
        sampled=tokens,
        sampled_objective=objective,
    )


def exact_gradients(world: World, lam: float, gate: float | None) -> list[Tensor]:
    """Of the KL between the student and the product of the pair, by summing over all sequences."""
    student, reference, aligned = (
        world.log_probabilities(who) for who in ("student", "reference", "aligned")
    )
    product = fuse64(reference, aligned, lam, gate).detach()
    kl = torch.zeros((), dtype=torch.float64)
    for sequence in sequences():
        log_s = log_probability(world, student, sequence)
        kl = kl + log_s.exp() * (log_s - log_probability(world, product, sequence))
    return gradients(kl, world)


def token_kls(world: World, lam: float, gate: float | None) -> Tensor:
    """The naive KL(student ‖ equation 5) of every prefix, with the student's graph."""
    student, reference, aligned = (
        world.log_probabilities(who) for who in ("student", "reference", "aligned")
    )
    teacher = torch.log_softmax(fuse64(reference, aligned, lam, gate).detach(), -1)
    return (student.exp() * (student - teacher)).sum(-1)


@pytest.mark.parametrize(("lam", "gate"), [(0.5, None), (2.0, None), (5.0, None), (3.0, 0.05)])
def test_the_sampled_tokens_rewards_have_the_gradient_of_the_naive_policy_gradient(
    world, lam, gate
):
    batch = [(1, 2, 0), (0,), (2, 2, 1)]
    student, reference, aligned = (
        world.log_probabilities(who) for who in ("student", "reference", "aligned")
    )
    teacher = torch.log_softmax(fuse64(reference, aligned, lam, gate), -1).detach()
    loss = torch.zeros((), dtype=torch.float64)
    for sequence in batch:
        for place, token in enumerate(sequence):
            prefix = world.prefixes.index(sequence[:place])
            reward = (teacher[prefix, token] - student[prefix, token]).detach()
            loss = loss - reward * student[prefix, token]
    expected = gradients(loss, world)
    for chunk_size in (1, 4, 100):
        found = sampled_loss(world, batch, lam, gate, chunk_size, "sampled")
        for part, other in zip(gradients(found, world), expected, strict=True):
            torch.testing.assert_close(part, other)


@pytest.mark.parametrize(("lam", "gate"), [(0.5, None), (2.0, None), (5.0, None), (3.0, 0.05)])
def test_the_mean_over_all_samples_of_the_tokens_rewards_is_the_gradient_of_the_tokens_kl(
    world, lam, gate
):
    """The places that the samples visit count as given, as for the divergence at every token."""
    table = world.log_probabilities("student").detach()
    kls = token_kls(world, lam, gate)
    loss, mean = torch.zeros((), dtype=torch.float64), [0.0, 0.0]
    for sequence in sequences():
        chance = float(log_probability(world, table, sequence).exp())
        visited = [world.prefixes.index(sequence[:place]) for place in range(len(sequence))]
        loss = loss + chance * kls[visited].sum()
        own = gradients(sampled_loss(world, [sequence], lam, gate, objective="sampled"), world)
        mean = [total + chance * part for total, part in zip(mean, own, strict=True)]
    for found, expected in zip(mean, gradients(loss, world), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_mean_reward_of_one_token_falls_as_finite_differences_say(world):
    """At the empty prefix, along every coordinate of the student's hidden state there."""
    mean = torch.zeros(WIDTH, dtype=torch.float64)
    chances = world.log_probabilities("student").detach()[0].exp().tolist()
    for token, chance in enumerate(chances):
        found = gradients(sampled_loss(world, [(token,)], 2.0, None, objective="sampled"), world)
        mean += chance * found[0][0]

    step, hidden = 1e-5, world.hidden["student"]
    for coordinate in range(WIDTH):
        ends = []
        for sign in (1, -1):
            moved = hidden.detach().clone()
            moved[0, coordinate] += sign * step
            near = world._replace(hidden=world.hidden | {"student": moved})
            ends.append(float(token_kls(near, 2.0, None)[0].detach()))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(mean[coordinate]) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize(("lam", "gate"), [(0.5, None), (2.0, None), (5.0, None), (3.0, 0.05)])
def test_the_mean_over_all_samples_is_the_gradient_of_the_sequences_kl(world, lam, gate):
    expected = exact_gradients(world, lam, gate)
    table = world.log_probabilities("student").detach()
    chances = {s: float(log_probability(world, table, s).exp()) for s in sequences()}
    assert sum(chances.values()) == pytest.approx(1)
    mean = [torch.zeros_like(part) for part in expected]
    for sequence, chance in chances.items():
        for total, part in zip(
            mean, gradients(sampled_loss(world, [sequence], lam, gate), world), strict=True
        ):
            total += chance * part
    for found, part in zip(mean, expected, strict=True):
        torch.testing.assert_close(found, part)


def test_comparing_with_the_others_of_the_batch_keeps_the_mean(world):
    """Each of the two rows has its own λ."""
    lams = torch.tensor([2.0, 0.5], dtype=torch.float64)
    expected = [
        one + two
        for one, two in zip(*(exact_gradients(world, lam, None) for lam in (2.0, 0.5)), strict=True)
    ]
    table = world.log_probabilities("student").detach()
    chances = {s: float(log_probability(world, table, s).exp()) for s in sequences()}
    mean = [torch.zeros_like(part) for part in expected]
    for (one, first), (two, second) in itertools.product(chances.items(), repeat=2):
        parts = gradients(sampled_loss(world, [one, two], lams, None), world)
        for total, part in zip(mean, parts, strict=True):
            total += first * second * part
    for found, part in zip(mean, expected, strict=True):
        torch.testing.assert_close(found, part)


def test_a_weight_is_what_follows_less_the_mean_of_what_follows_at_that_place_elsewhere(world):
    batch = [(1, 2, 0), (0,), (2, 2, 1)]
    rows, tokens, mask = as_batch(world, batch)
    sides = {
        name: part
        for who in ("reference", "aligned")
        for name, part in (
            (f"{who}_hidden", world.hidden[who][rows].flatten(0, 1)),
            (who, Head(world.heads[who])),
        )
    }
    teacher = FusedTeacher(**sides, lam=2.0, gate=None, mixes_hidden=False)
    hidden, head = (part.detach() for part in (world.hidden["student"], world.heads["student"]))
    score = sampled_score(hidden[rows].flatten(0, 1), Head(head), teacher, mask, tokens, 3)

    log_s, log_r, log_a = (
        world.log_probabilities(who).detach() for who in ("student", "reference", "aligned")
    )
    cost = (log_s.exp() * (log_s - fuse64(log_r, log_a, 2.0))).sum(-1).tolist()
    follows = [
        [
            sum(cost[world.prefixes.index(sequence[:later])] for later in range(at, len(sequence)))
            for at in range(1, len(sequence) + 1)
        ]
        for sequence in batch
    ]
    expected = []
    for row, own in enumerate(follows):
        for place, cost_of_rest in enumerate(own):
            others = [f[place] for i, f in enumerate(follows) if i != row and place < len(f)]
            expected.append(cost_of_rest - (sum(others) / len(others) if others else 0.0))
    torch.testing.assert_close(score.weights, torch.tensor(expected, dtype=torch.float64))
    assert score.tokens.tolist() == [token for sequence in batch for token in sequence]


def test_comparing_with_the_others_of_the_batch_makes_the_gradient_vary_less(world):
    table = world.log_probabilities("student").detach()
    chances = torch.stack([log_probability(world, table, s).exp() for s in sequences()])
    generator = torch.Generator().manual_seed(0)
    expected = exact_gradients(world, 5.0, None)
    alone = [gradients(sampled_loss(world, [s], 5.0, None), world) for s in sequences()]
    spread = {"alone": 0.0, "together": 0.0}
    for _ in range(100):
        drawn = chances.multinomial(16, replacement=True, generator=generator).tolist()
        batch = [sequences()[index] for index in drawn]
        together = gradients(sampled_loss(world, batch, 5.0, None), world)
        for part, truth, apart in zip(
            together, expected, zip(*(alone[i] for i in drawn), strict=True), strict=True
        ):
            spread["together"] += float((part - 16 * truth).square().sum())
            spread["alone"] += float((torch.stack(apart).sum(0) - 16 * truth).square().sum())
    assert spread["together"] < 0.9 * spread["alone"]


def test_the_value_is_that_of_the_tokens_however_it_is_cut(world):
    batch = [(1, 2, 0), (0,), (2, 2, 1)]
    losses = [sampled_loss(world, batch, 2.0, None, chunk_size) for chunk_size in (1, 4, 100)]
    value_of_rewards = sampled_loss(world, batch, 2.0, None, 4, "sampled").detach()
    student, reference, aligned = (
        world.log_probabilities(who) for who in ("student", "reference", "aligned")
    )
    fused = torch.log_softmax(fuse64(reference, aligned, 2.0), -1)
    tokens = (student.exp() * (student - fused)).sum(-1)
    visited = [world.prefixes.index(row[:place]) for row in batch for place in range(len(row))]
    found = [gradients(loss, world) for loss in losses]
    torch.testing.assert_close(value_of_rewards, tokens[visited].sum())
    for loss, parts in zip(losses, found, strict=True):
        torch.testing.assert_close(loss, tokens[visited].sum())
        torch.testing.assert_close(parts, found[0])


def test_no_more_than_a_chunk_of_logits_is_made_at_one_time(world, monkeypatch):
    sizes: list[int] = []
    write = flexalign.losses.sequence.write_logits

    def watched(head, hidden, out):
        sizes.append(len(out))
        return write(head, hidden, out)

    monkeypatch.setattr(flexalign.losses.sequence, "write_logits", watched)
    sampled_loss(world, [(1, 2, 0), (0,), (2, 2, 1)], 2.0, None, chunk_size=3)
    assert sizes == [3, 3, 1]


def test_nothing_sampled_is_zero_with_its_graph(world):
    sides = [
        part
        for who in ("student", "reference", "aligned")
        for part in (world.hidden[who][None], world.heads[who])
    ]
    nothing = torch.zeros(1, len(world.prefixes), dtype=torch.long)
    loss = fused_divergence(*sides, nothing, 2.0, sampled=nothing)
    assert loss == 0.0
    assert all((part == 0).all() for part in gradients(loss, world))


def test_half_precision_is_weighed_in_float32():
    """Nearly all gradients are float64's, rounded once; some of the costs' sums lie on an edge."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"hidden": (8, 7, 16), "head": (31, 16)}
    sides = [
        (2 * torch.randn(shape, generator=generator)).bfloat16()
        for _ in ("student", "reference", "aligned")
        for shape in shapes.values()
    ]
    lengths = torch.tensor([7, 7, 6, 5, 4, 4, 1, 0])
    mask = (torch.arange(7) < lengths[:, None]).long()
    tokens = torch.randint(31, mask.shape, generator=generator)
    lam = torch.linspace(-0.5, 3, 8)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        given = [side.to(dtype) for side in sides]
        leaves = [side.requires_grad_() for side in given[:2]]
        loss = fused_divergence(*given, mask, lam, chunk_size=9, sampled=tokens)
        found.append(torch.autograd.grad(loss, leaves))
    for half, exact in zip(*found, strict=True):
        assert half.dtype == torch.bfloat16
        assert (half != exact.bfloat16()).float().mean() < 0.02
        torch.testing.assert_close(half.double(), exact, rtol=0.01, atol=1e-5)


def test_tokens_that_no_model_can_write_weigh_nothing():
    """−inf in all three biases equals heads without those rows."""
    generator = torch.Generator().manual_seed(6)
    whole, cut = [], []
    for _ in ("student", "reference", "aligned"):
        hidden = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
        head = Head(
            torch.randn(9, 4, generator=generator, dtype=torch.float64),
            torch.randn(9, generator=generator, dtype=torch.float64),
        )
        cut += [hidden, head.cut(7)]
        head.bias[7:] = -torch.inf
        whole += [hidden, head]
    tokens = torch.randint(7, (3, 5), generator=generator)
    whole[0].requires_grad_()
    gradients = [
        torch.autograd.grad(
            fused_divergence(*sides, torch.ones(3, 5), 2.0, sampled=tokens), whole[0]
        )
        for sides in (whole, cut)
    ]
    torch.testing.assert_close(*gradients)


def test_samples_are_for_the_reverse_divergence_of_rows(world):
    hidden = [part[None] for part in world.hidden.values()]
    heads = world.heads.values()
    tokens = torch.zeros(1, len(world.prefixes), dtype=torch.long)

    def loss(hidden: list[Tensor], mask: Tensor, sampled: Tensor, **settings: object) -> Tensor:
        sides = [part for pair in zip(hidden, heads, strict=True) for part in pair]
        return fused_divergence(*sides, mask, 2.0, sampled=sampled, **settings)

    mask = tokens.bool()
    loss(hidden, mask, tokens, divergence="jsd", beta=1.0)
    for settings in ({"divergence": "forward"}, {"divergence": "jsd", "beta": 0.5}):
        with pytest.raises(ConfigError, match="sampled is for the reverse divergence"):
            loss(hidden, mask, tokens, **settings)
    with pytest.raises(ConfigError, match="one of sequence, sampled"):
        loss(hidden, mask, tokens, sampled_objective="token")
    with pytest.raises(ConfigError, match=r"got \(1, 6\) and \(1, 7\)"):
        loss(hidden, mask, tokens[:, 1:])
    for flat in ([part[0] for part in hidden], [part[None] for part in hidden]):
        like = tokens.reshape(flat[0].shape[:-1])
        with pytest.raises(ConfigError, match="batch of rows"):
            loss(flat, like.bool(), like)
