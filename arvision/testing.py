"""Tools for testing samplers and models, ours and those of plug-in authors.

`TableModel` is a token model whose joint law can be enumerated, `ScaleTable` a scale model of that
kind; `law_p_value` says how well drawn samples fit an enumerated law; `tiny_llamagen` is a real network small enough for tests.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .contracts import Conditions
from .errors import InputError, StateError, optional
from .models import LlamaGen, LlamaGenTokenizer, LlamaGenTransformer


class TableModel:
    """A token model given by a table: the law of every token after every prefix.

    Args:
        vocab_size: V.
        num_tokens: N.
        seed: of the random table.
        sharpness: scale of the logits; larger is more peaked.
        grid: rows and columns, for samplers that look at the image grid.
        allows_overrun: whether candidates past the last token are accepted.
    """

    def __init__(
        self,
        vocab_size: int = 4,
        num_tokens: int = 4,
        seed: int = 0,
        sharpness: float = 1.5,
        grid: tuple[int, int] | None = None,
        allows_overrun: bool = False,
    ) -> None:
        self.vocab_size, self.num_tokens, self.grid = vocab_size, num_tokens, grid
        self.allows_overrun, self.takes_trees = allows_overrun, True
        generator = torch.Generator().manual_seed(seed)
        num_prefixes = sum(vocab_size**length for length in range(num_tokens))
        self.table = sharpness * torch.randn(
            num_prefixes, vocab_size, generator=generator, dtype=torch.float64
        )
        self._offsets = torch.tensor(
            [sum(vocab_size**k for k in range(length)) for length in range(num_tokens + 1)]
        )

    def row(self, prefixes: Tensor, lengths: Tensor) -> Tensor:
        """Row of the table of prefixes given as numbers in base V, [...] with lengths [...]."""
        return self._offsets[lengths] + prefixes

    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0
    ) -> tuple[TableState, Tensor]:
        """Conditions are ignored, apart from their number."""
        state = TableState(self, len(conditions))
        return state, self.table[:1].expand(len(conditions), -1)

    def decode(self, tokens: Tensor) -> Tensor:
        """A grey picture [B, 3, 1, N] of the tokens."""
        grey = tokens.float() / max(1, self.vocab_size - 1) * 2 - 1
        return grey[:, None, None, :].expand(-1, 3, -1, -1)

    def joint(self, shape: Any) -> Tensor:
        """The enumerated joint law [V^N] float64 under `shape` (logits to log-probabilities).

        Sequences are ordered as numbers in base V, first token most significant.
        """
        logp = shape(self.table)
        total = []
        for sequence in itertools.product(range(self.vocab_size), repeat=self.num_tokens):
            prefix, sum_logp = 0, 0.0
            for length, token in enumerate(sequence):
                sum_logp += float(logp[int(self._offsets[length]) + prefix, token])
                prefix = prefix * self.vocab_size + token
            total.append(sum_logp)
        return torch.tensor(total, dtype=torch.float64).exp()

    def number(self, tokens: Tensor) -> Tensor:
        """Sequences [B, N] as numbers in base V, the order of `joint`."""
        return _in_base(tokens, self.vocab_size)


def _in_base(tokens: Tensor, base: int) -> Tensor:
    powers = base ** torch.arange(tokens.shape[-1] - 1, -1, -1)
    return (tokens * powers).sum(-1)


class TableState:
    """Decode state of a `TableModel`: prefixes as numbers."""

    def __init__(self, model: TableModel, batch: int) -> None:
        self._model = model
        self.allows_overrun = model.allows_overrun
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._prefixes = torch.zeros(batch, dtype=torch.int64)
        self._pending: tuple[Tensor, Tensor] | None = None

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] after each candidate."""
        model, num = self._model, tokens.shape[1]
        above = torch.arange(-1, num - 1) if parents is None else parents
        above = above.expand(len(tokens), num) + 1
        # Column 0 is the committed prefix, column t + 1 what ends with candidate t.
        stacked = self._prefixes[:, None].repeat(1, num + 1)
        depth = self.lengths[:, None].repeat(1, num + 1)
        for place in range(num):
            before = above[:, place : place + 1]
            own = stacked.gather(1, before)[:, 0] * model.vocab_size
            stacked[:, place + 1] = own + tokens[:, place]
            depth[:, place + 1] = depth.gather(1, before)[:, 0] + 1
        stacked, depth = stacked[:, 1:], depth[:, 1:]
        beyond = depth >= model.num_tokens
        if bool(beyond.any()) and not self.allows_overrun:
            raise StateError("candidates past the last token")
        self._pending = (stacked, depth)
        rows = model.row(stacked.masked_fill(beyond, 0), depth.masked_fill(beyond, 0))
        return model.table[rows]

    def commit(self, kept: Tensor, counts: Tensor) -> None:
        """Keep the paths that end at the last kept candidate of each row."""
        if self._pending is None:
            raise StateError("commit without candidates: call extend first")
        prefixes, lengths = self._pending
        last = kept.gather(1, (counts - 1).clamp(min=0)[:, None])
        moved = counts > 0
        self._prefixes = torch.where(moved, prefixes.gather(1, last)[:, 0], self._prefixes)
        self.lengths = torch.where(moved, lengths.gather(1, last)[:, 0], self.lengths)
        self._pending = None


class DroppingTableModel(TableModel):
    """A `TableModel` whose state drops rows, takes others in, and takes candidates past the end."""

    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0
    ) -> tuple[TableState, Tensor]:
        """As in `TableModel`."""
        self.allows_overrun = True
        state = _DroppingState(self, len(conditions))
        return state, self.table[:1].expand(len(conditions), -1)


class _DroppingState(TableState):
    def select(self, rows: Tensor) -> None:
        self.lengths, self._prefixes = self.lengths[rows], self._prefixes[rows]

    def join(self, other: TableState) -> None:
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._prefixes = torch.cat([self._prefixes, other._prefixes])


class ScaleTable:
    """A scale model given by tables: the laws of a scale's tokens after all coarser tokens.

    Args:
        vocab_size: V.
        scales: side lengths, or pairs (height, width).
        seed: of the random tables.
        sharpness: scale of the logits; larger is more peaked.
        num_bits: d for a model whose tokens are d bits (V is then 2); None for one of codes.
    """

    def __init__(
        self,
        vocab_size: int = 3,
        scales: tuple[Any, ...] = (1, 2),
        seed: int = 0,
        sharpness: float = 1.5,
        num_bits: int | None = None,
    ) -> None:
        self.vocab_size, self.scales, self.num_bits = vocab_size, scales, num_bits
        pairs = [size if isinstance(size, tuple) else (size, size) for size in scales]
        self.counts = [height * width for height, width in pairs]
        self.num_tokens = sum(self.counts)
        generator = torch.Generator().manual_seed(seed)
        self.tables, done = [], 0
        for count in self.counts:
            places = (count,) if num_bits is None else (count, num_bits)
            shape = (vocab_size**done, *places, vocab_size)
            logits = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.tables.append(sharpness * logits)
            done += count * (num_bits or 1)

    def start(self, conditions: Conditions, guidance_scale: Any = 1.0) -> _ScaleTableState:
        """Conditions are ignored, apart from their number."""
        return _ScaleTableState(self, len(conditions))

    def decode(self, tokens: Tensor) -> Tensor:
        """A grey picture [B, 3, 1, N] of the tokens."""
        grey = tokens.flatten(1).float() / max(1, self.vocab_size - 1) * 2 - 1
        return grey[:, None, None, :].expand(-1, 3, -1, -1)

    def joint(self, shape: Any) -> Tensor:
        """The enumerated joint law float64 under `shape`; see `TableModel.joint`."""
        joint = torch.ones(1, dtype=torch.float64)
        for table in self.tables:
            laws = shape(table).exp().flatten(1, -2)  # [prefixes, n, V], independent in a scale
            for place in range(laws.shape[1]):
                repeats = len(joint) // len(laws)
                law = laws[:, place].repeat_interleave(repeats, dim=0)
                joint = (joint[:, None] * law).flatten()
        return joint

    def number(self, tokens: Tensor) -> Tensor:
        """Sequences [B, N] or [B, N, d] as numbers in base V, the order of `joint`."""
        return _in_base(tokens.flatten(1), self.vocab_size)


class _ScaleTableState:
    def __init__(self, model: ScaleTable, batch: int) -> None:
        self._model, self._scale = model, 0
        self._prefixes = torch.zeros(batch, dtype=torch.int64)

    def next(self) -> Tensor:
        return self._model.tables[self._scale][self._prefixes]

    def feed(self, tokens: Tensor) -> None:
        base, flat = self._model.vocab_size, tokens.flatten(1)
        self._prefixes = self._prefixes * base ** flat.shape[1] + _in_base(flat, base)
        self._scale += 1

    def catch_up(self, tokens: Tensor) -> None:
        done = 0
        while done < tokens.shape[1]:
            num = self._model.counts[self._scale]
            self.feed(tokens[:, done : done + num])
            done += num


def law_p_value(samples: Tensor, law: Tensor) -> float:
    """p-value of Pearson's chi-square test that samples follow a law.

    Cells expected fewer than 5 times are pooled.

    Args:
        samples: [M] int64, numbers of the outcomes.
        law: [K] float64, probabilities of the outcomes.

    Raises:
        InputError: an outcome that the law rules out, or fewer than 2 cells.
    """
    with optional("eval", "a test of a law"):
        from scipy import stats

    counts = torch.bincount(samples, minlength=len(law)).double()
    if bool((counts[law == 0] > 0).any()):
        return 0.0
    expected = law / law.sum() * len(samples)
    large = expected >= 5
    cells = torch.cat([counts[large], counts[~large].sum()[None]])
    means = torch.cat([expected[large], expected[~large].sum()[None]])
    cells, means = cells[means > 0], means[means > 0]
    if len(cells) < 2:
        raise InputError(f"{len(cells)} cells: a chi-square test needs at least 2")
    tests: Any = stats  # its stubs lack the results' fields
    return float(tests.chisquare(cells.numpy(), means.numpy()).pvalue)


def draw_joint(sampler: Any, model: TableModel | ScaleTable, num: int, seed: int) -> Tensor:
    """Numbers [num] of sequences that `sampler` draws from `model` in one batch."""
    seeds = [(seed, image) for image in range(num)]
    samples = sampler(model, [None] * num, seeds=seeds, guidance_scale=1.0)
    return model.number(samples.tokens)


def tiny_llamagen(
    grid: tuple[int, int] = (4, 4), seed: int = 0, sharpness: float = 8.0, **sizes: Any
) -> LlamaGen:
    """A randomly initialised LlamaGen with 3 classes and 64 codes, float32, on the CPU.

    Args:
        grid: rows and columns of tokens; an image has 4 pixels per token and side.
        seed: of the weights.
        sharpness: factor on the output layer, so that laws are not nearly uniform.
        **sizes: further arguments of `LlamaGenTransformer`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        defaults: dict[str, Any] = {
            "vocab_size": 64,
            "grid": grid,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 64,
        }
        if "caption_dim" not in sizes:
            defaults["num_classes"] = 3
        transformer = LlamaGenTransformer(**defaults | sizes).eval()
        for parameter in transformer.parameters():
            parameter.data.mul_(3.0)
        transformer.output.weight.data.mul_(sharpness)
        tokenizer = LlamaGenTokenizer(
            ch=32,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            z_channels=32,
            codebook_size=64,
            num_recorded=0,
        ).eval()
    names = ["cat", "dog", "ankle boot"] if "caption_dim" not in sizes else None
    return LlamaGen(transformer, tokenizer, class_names=names)
