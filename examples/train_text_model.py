"""Train a small character-level Transformer on Python's source text, with torch's attention and with ours.

    python examples/train_text_model.py            # some minutes on two cores
    python examples/train_text_model.py --quick    # under a minute

The text is the standard library of the Python that runs this. The model is an ordinary `torch.nn.TransformerEncoder`
with a causal mask. It is built twice from one seed; the second is converted with `fused_mha.convert`. Both see the same
batches, without dropout, so their losses must agree.

The two trainings run in one loop, a step of one and then a step of the other, in alternating order, and each step is
timed by itself: on a machine that others use, two runs one after the other would compare the machine's load as well.
Tokens per second are those of the median step.

Out come a table (the largest difference of the losses, tokens per second, a sample of text that the converted model
writes) and, in the folder `--out`, `train_text_model.png` with both loss curves and `train_text_model.json` with every
number. The exit status is 1 if the losses differ by more than 1e-3 in the first 50 steps, or their means over the last
10 % of the steps by more than 2 %. Ctrl-C ends the training early and reports what was measured until then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fused_mha

FIRST_STEPS = 50
FIRST_STEPS_LIMIT = 1e-3
LAST_FRACTION = 0.1
LAST_MEANS_LIMIT = 0.02

# Tests and installed packages, and tables that are data rather than code.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
INDENTATION = " " * 4  # each becomes one tab: a quarter of the text would be runs of spaces otherwise
RARE_CHARACTER = "\N{REPLACEMENT CHARACTER}"
INTERRUPTED = 130  # the exit status that shells give a command ended by Ctrl-C

QUICK = {"steps": 60, "batch_size": 8, "context": 64, "layers": 2, "embed_dim": 64, "heads": 4}


class Text(NamedTuple):
    """A text as numbers: `codes` (characters,) int64 are indices into `vocabulary`, 0 for every rare character."""

    codes: Tensor
    vocabulary: list[str]
    n_files: int

    def encode(self, characters: str) -> Tensor:
        index = {character: i for i, character in enumerate(self.vocabulary)}
        return torch.tensor([index.get(character, 0) for character in characters], dtype=torch.long)

    def decode(self, codes: Tensor) -> str:
        return "".join(self.vocabulary[i] for i in codes.tolist())


def standard_library_text(max_characters: int = 4_000_000, rare_below: int = 20) -> Text:
    """The source of this Python's standard library, file after file in the order of their paths.

    Four spaces are written as one tab; `generate` writes them as spaces again.

    Args:
        max_characters: where the text is cut off.
        rare_below: characters that occur less often share one code.

    Returns:
        The text and its vocabulary.

    Raises:
        FileNotFoundError: this Python has no standard library in source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    sources: list[str] = []
    length = 0
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        if length >= max_characters:
            break
        sources.append(path.read_text(encoding="utf-8", errors="replace").replace(INDENTATION, "\t"))
        length += len(sources[-1])
    if not length:
        raise FileNotFoundError(f"no Python source files in {root}: this Python has its standard library elsewhere")
    text = "".join(sources)[:max_characters]
    frequent = sorted(character for character, count in Counter(text).items() if count >= rare_below)
    vocabulary = [RARE_CHARACTER, *(character for character in frequent if character != RARE_CHARACTER)]
    codes = Text(torch.empty(0), vocabulary, 0).encode(text)
    return Text(codes, vocabulary, len(sources))


class TextModel(nn.Module):
    """A causal Transformer: codes (N, L) to logits of the next character (N, L, vocabulary)."""

    def __init__(self, vocabulary_size: int, context: int, layers: int, embed_dim: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(vocabulary_size, embed_dim)
        self.positions = nn.Embedding(context, embed_dim)
        layer = nn.TransformerEncoderLayer(
            embed_dim, heads, 4 * embed_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(embed_dim), enable_nested_tensor=False)
        self.next_character = nn.Linear(embed_dim, vocabulary_size)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.05)
        # Additive, (context, context): -inf above the diagonal, so that no character sees a later one.
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("causal_mask", mask, persistent=False)
        self.causal_mask: Tensor

    def forward(self, codes: Tensor) -> Tensor:
        length = codes.shape[1]
        x = self.characters(codes) + self.positions.weight[:length]
        return self.next_character(self.encoder(x, mask=self.causal_mask[:length, :length], is_causal=True))


NextLogits = Callable[[Tensor], Tensor]  # codes (L) of a text to the logits (vocabulary) of its next character


@torch.no_grad()
def generate(next_logits: NextLogits, text: Text, prompt: str, length: int, temperature: float, seed: int) -> str:
    """Continue ``prompt`` by ``length`` characters, each drawn from a model's distribution."""
    generator = torch.Generator().manual_seed(seed)
    codes = text.encode(prompt.replace(INDENTATION, "\t"))
    for _ in range(length):
        logits = next_logits(codes)
        if not logits.isfinite().all():
            break  # a model that has diverged knows no next character
        logits[0] = -math.inf  # the code of rare characters stands for none in particular
        drawn = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        codes = torch.cat([codes, drawn])
    return text.decode(codes).replace("\t", INDENTATION)


def batches(text: Text, batch_size: int, context: int, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """What gives a batch of pieces of the text, and of the same one character later, at each call."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)

    def next_batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text.codes) - context, (batch_size, 1), generator=generator)
        windows = text.codes[starts + offsets]
        return windows[:, :-1], windows[:, 1:]

    return next_batch


class Training:
    """A model being trained, with its loss and its seconds by step."""

    def __init__(self, name: str, model: nn.Module, learning_rate: float, steps: int) -> None:
        self.name = name
        self.model = model
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
        warm_up = max(1, steps // 20)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / steps)),
        )

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        loss_value = loss.item()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss_value)


def train_in_turns(trainings: Sequence[Training], next_batch: Callable[[], tuple[Tensor, Tensor]], steps: int) -> bool:
    """Take ``steps`` steps of each training on the same batches; False if Ctrl-C ended it early."""
    on_terminal = sys.stderr.isatty()
    progress = tqdm(range(steps), unit="step", disable=not on_terminal)
    start = time.perf_counter()
    try:
        for step in progress:
            batch = next_batch()
            for training in trainings if step % 2 == 0 else reversed(trainings):
                training.step(*batch)
            losses = [f"{training.name} {training.losses[-1]:.4f}" for training in trainings]
            if on_terminal:
                progress.set_postfix_str("loss: " + ", ".join(losses))
            elif step == 0 or (step + 1) % max(1, steps // 10) == 0:
                elapsed = time.perf_counter() - start
                print(f"  step {step + 1:>4} of {steps}, {elapsed:5.1f} s, loss: {', '.join(losses)}", flush=True)
    except KeyboardInterrupt:
        whole = min(len(training.losses) for training in trainings)  # a step that only one of them took is dropped
        for training in trainings:
            del training.losses[whole:], training.seconds[whole:]
        return False
    finally:
        progress.close()
    return True


class LossComparison(NamedTuple):
    """How far two loss curves lie apart, and what of it is too far."""

    first_steps: int
    largest_first: float
    largest: float
    last_steps: int
    last_means: tuple[float, float]
    problems: list[str]

    @property
    def last_means_difference(self) -> float:
        return abs(self.last_means[1] - self.last_means[0]) / self.last_means[0]


def compare_losses(theirs: Sequence[float], ours: Sequence[float]) -> LossComparison:
    """Compare the losses of torch's model, ``theirs``, with those of the converted one, step by step."""
    differences = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
    last_steps = max(1, round(len(theirs) * LAST_FRACTION))
    comparison = LossComparison(
        first_steps=min(FIRST_STEPS, len(theirs)),
        largest_first=_largest(differences[:FIRST_STEPS]),
        largest=_largest(differences),
        last_steps=last_steps,
        last_means=(statistics.fmean(theirs[-last_steps:]), statistics.fmean(ours[-last_steps:])),
        problems=[],
    )
    if not comparison.largest_first <= FIRST_STEPS_LIMIT:
        comparison.problems.append(
            f"the losses differ by up to {comparison.largest_first:.2e} in the first {comparison.first_steps} steps; "
            f"at most {FIRST_STEPS_LIMIT:g} is allowed"
        )
    if not comparison.last_means_difference <= LAST_MEANS_LIMIT:
        comparison.problems.append(
            f"the means over the last {last_steps} steps, {comparison.last_means[0]:.4f} and "
            f"{comparison.last_means[1]:.4f}, differ by {comparison.last_means_difference:.2%}; at most "
            f"{LAST_MEANS_LIMIT:.0%} is allowed"
        )
    return comparison


def _largest(differences: Sequence[float]) -> float:
    # max() would pass over a NaN that is not the first.
    return math.nan if any(math.isnan(difference) for difference in differences) else max(differences)


def table(theirs: Training, ours: Training, comparison: LossComparison, tokens_per_step: int) -> str:
    """What was measured, for the terminal."""

    def verdict(largest: float, limit: float) -> str:
        return "ok" if largest <= limit else "TOO FAR"

    def row(label: str, *values: str) -> str:
        return f"{label:<44}" + "".join(f"{value:>14}" for value in values)

    speeds = [tokens_per_second(training, tokens_per_step) for training in (theirs, ours)]
    steps = len(theirs.losses)
    return "\n".join(
        [
            row("", theirs.name, ours.name),
            row("loss at the first step", f"{theirs.losses[0]:.6f}", f"{ours.losses[0]:.6f}"),
            row(
                f"mean loss of the last {comparison.last_steps} of {steps} steps",
                f"{comparison.last_means[0]:.6f}",
                f"{comparison.last_means[1]:.6f}",
            ),
            row("tokens per second (median step)", *(f"{speed:,.0f}" for speed in speeds)),
            row("median step", *(f"{statistics.median(x.seconds) * 1e3:.1f} ms" for x in (theirs, ours))),
            "",
            row("difference of the losses", "measured", "allowed"),
            row(
                f"largest in the first {comparison.first_steps} steps",
                f"{comparison.largest_first:.2e}",
                f"{FIRST_STEPS_LIMIT:.2e}",
                verdict(comparison.largest_first, FIRST_STEPS_LIMIT),
            ),
            row(
                f"of the means of the last {comparison.last_steps} steps",
                f"{comparison.last_means_difference:.5%}",
                f"{LAST_MEANS_LIMIT:.5%}",
                verdict(comparison.last_means_difference, LAST_MEANS_LIMIT),
            ),
            row(f"largest in all {steps} steps", f"{comparison.largest:.2e}"),
        ]
    )


def tokens_per_second(training: Training, tokens_per_step: int) -> float:
    return tokens_per_step / statistics.median(training.seconds)


def plot_losses(theirs: Training, ours: Training, title: str, path: Path) -> None:
    """Both loss curves side by side, and under them how far they lie apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (of the extra `bench`)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["theirs", "ours"], ["difference", "difference"]], height_ratios=(2, 1))
    axes["ours"].sharey(axes["theirs"])
    steps = range(1, len(theirs.losses) + 1)
    for key, training, color in (("theirs", theirs, "tab:orange"), ("ours", ours, "tab:blue")):
        panel = axes[key]
        panel.plot(steps, training.losses, color=color, alpha=0.35, linewidth=1, label="each step")
        panel.plot(steps, _smooth(training.losses), color=color, linewidth=2, label="running mean")
        panel.set_title(training.name)
        panel.set_xlabel("step")
        panel.legend(frameon=False)
    axes["theirs"].set_ylabel("loss (nats per character)")

    panel = axes["difference"]
    differences = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    if any(difference > 0 for difference in differences):
        drawn = [difference if difference > 0 else math.nan for difference in differences]  # no logarithm of 0
        panel.semilogy(
            steps, drawn, color="0.3", linestyle="none", marker=".", markersize=4, label="|difference| (no dot: 0)"
        )
    else:
        panel.plot(steps, differences, color="0.3", label="|difference|: 0 in every step")
    panel.plot(
        [1, min(FIRST_STEPS, len(differences))],
        [FIRST_STEPS_LIMIT] * 2,
        color="tab:red",
        linestyle="--",
        label=f"allowed in the first {FIRST_STEPS} steps",
    )
    panel.set_xlabel("step")
    panel.set_ylabel("difference of the losses")
    panel.legend(frameon=False, ncols=2)
    for panel in axes.values():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    write_whole(path, lambda part: figure.savefig(part, dpi=150, format="png"))


def _smooth(losses: Sequence[float]) -> list[float]:
    """The mean over the neighbours of each step, fewer at the steep beginning."""
    reaches = [min(i, max(1, len(losses) // 40)) for i in range(len(losses))]
    return [statistics.fmean(losses[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file beside ``path``, and move it there only when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def positive(text: str) -> int:
    """An argument of the command line that has to be a whole number from 1 up."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up; got {text!r}")
    return int(text)


def seed_number(text: str) -> int:
    """An argument of the command line that seeds a random generator."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1; got {text!r}")
    return int(text)


def output_folder(parser: argparse.ArgumentParser, folder: Path) -> Path:
    """Make ``folder`` and see that it and matplotlib can be used, before any time is spent."""
    try:
        import matplotlib  # noqa: F401, PLC0415  (only the plot needs it)
    except ImportError:
        parser.error("the plot needs matplotlib: pip install 'fused-mha[bench]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {folder}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        parser.error(f"--out {folder}: not writable")
    return folder


def parse_with_quick(
    parser: argparse.ArgumentParser, quick: dict[str, int], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse with one more option, `--quick`, under which other defaults hold."""
    short = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in quick.items())
    parser.add_argument("--quick", action="store_true", help=f"a short run: {short}, unless given")
    options = parser.parse_args(arguments)
    if not options.quick:
        return options
    parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Text]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=1500, help="of each training (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help="(default: %(default)s)")
    parser.add_argument("--context", type=positive, default=64, help="characters seen (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--embed-dim", type=positive, default=192, help="(default: %(default)s)")
    parser.add_argument("--heads", type=positive, default=6, help="divides --embed-dim (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak (default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of parameters and batches (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="of torch (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results (default: %(default)s)")
    options = parse_with_quick(parser, QUICK, arguments)
    if options.embed_dim % options.heads:
        parser.error(f"--heads must divide --embed-dim; got {options.heads} and {options.embed_dim}")
    if not 0 < options.learning_rate < math.inf:
        parser.error(f"--learning-rate must be positive; got {options.learning_rate}")
    if options.threads is not None and options.threads > (cores := os.cpu_count() or 1):
        parser.error(f"--threads must be at most the {cores} cores of this machine; got {options.threads}")
    output_folder(parser, options.out)
    try:
        text = standard_library_text()
    except OSError as error:
        parser.error(str(error))
    if len(text.codes) <= options.context:
        parser.error(f"--context must be less than the text's {len(text.codes)} characters; got {options.context}")
    return options, text


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both models; returns the exit status."""
    options, text = parse_options(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    trainings = []
    for name in ("torch", "converted"):
        torch.manual_seed(options.seed)
        model = TextModel(len(text.vocabulary), options.context, options.layers, options.embed_dim, options.heads)
        if name == "converted":
            fused_mha.convert(model)
        trainings.append(Training(name, model, options.learning_rate, options.steps))
    theirs, ours = trainings
    n_parameters = sum(parameter.numel() for parameter in ours.model.parameters())
    print(
        f"text       {len(text.codes):,} characters of {text.n_files} files of Python {platform.python_version()}'s "
        f"standard library, vocabulary {len(text.vocabulary)}\n"
        f"model      {n_parameters:,} parameters: {options.layers} layers, embed_dim {options.embed_dim}, "
        f"{options.heads} heads, context {options.context}\n"
        f"training   {options.steps} steps of {options.batch_size} x {options.context} characters, twice, seed "
        f"{options.seed}\n"
        f"with       torch {torch.__version__}, fused_mha {fused_mha.__version__}, "
        f"{torch.get_num_threads()} threads\n",
        flush=True,
    )

    next_batch = batches(text, options.batch_size, options.context, options.seed)
    finished = train_in_turns(trainings, next_batch, options.steps)
    steps = len(ours.losses)
    if not finished:
        print(f"\ninterrupted after {steps} of {options.steps} steps")
    if not steps:
        return INTERRUPTED

    comparison = compare_losses(theirs.losses, ours.losses)
    tokens_per_step = options.batch_size * options.context
    model = ours.model.eval()
    sample = generate(
        lambda codes: model(codes[None, -options.context :])[0, -1], text, "\n    def ", 500, 0.6, options.seed
    )
    results = {
        "options": {**vars(options), "out": str(options.out)},
        "torch_version": torch.__version__,
        "fused_mha_version": fused_mha.__version__,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "largest_difference_first_steps": comparison.largest_first,
        "largest_difference": comparison.largest,
        "last_means": comparison.last_means,
        "last_means_difference": comparison.last_means_difference,
        "problems": comparison.problems,
        "tokens_per_second": {x.name: tokens_per_second(x, tokens_per_step) for x in trainings},
        "losses": {x.name: x.losses for x in trainings},
        "seconds": {x.name: x.seconds for x in trainings},
        "sample": sample,
    }
    plot = options.out / "train_text_model.png"
    numbers = options.out / "train_text_model.json"
    title = f"A character model on Python's standard library: torch's attention, and converted ({steps} steps)"
    plot_losses(theirs, ours, title, plot)
    write_whole(numbers, lambda part: part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8"))

    print(f"\n{table(theirs, ours, comparison, tokens_per_step)}\n")
    print("the converted model writes:\n" + "\n".join("  | " + line for line in sample.strip("\n").splitlines()))
    print(f"\nwrote {plot} and {numbers}")
    for problem in comparison.problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    if not finished:
        return INTERRUPTED
    return 1 if comparison.problems else 0


def exit_status(main: Callable[[], int]) -> int:
    """What ``main`` returns; Ctrl-C where it does not expect one ends in a line, not in a traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(exit_status(main))
