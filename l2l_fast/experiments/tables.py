"""Tables of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from l2l_fast.experiments.cost_model import ARCHITECTURES, H200
from l2l_fast.experiments.evaluate import Evaluation, mean_of
from l2l_fast.experiments.figures import LABELS
from l2l_fast.experiments.kernels import Analysis
from l2l_fast.experiments.numerics import Comparison
from l2l_fast.experiments.precision import FLOAT16_BOUND, NARROW_BOUND, Drift
from l2l_fast.experiments.speed import Timing
from l2l_fast.experiments.state_losses import StateLoss
from l2l_fast.meta import Diagnosis, SearchResult
from l2l_fast.meta.diagnostics import Histogram
from l2l_fast.spec import LogAndSign, Preprocess


def describe(preprocess: Preprocess) -> str:
    """A preprocessing in words."""
    return f"log and sign, p = {preprocess.p:g}" if isinstance(preprocess, LogAndSign) else "raw gradient"


def _table(title: str, *, caption: str | None = None) -> Table:
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")


def evaluation_table(evaluation: Evaluation) -> Table:
    """Final losses, and every optimizer relative to the best tuned baseline."""
    table = _table(
        f"{evaluation.problem}: loss at step {evaluation.steps}, mean over {evaluation.functions} fresh functions"
    )
    table.add_column("optimizer")
    for column in ("lr", "final loss", f"/ {LABELS[evaluation.best_baseline]}", "95 % interval", "won"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, run in evaluation.runs.items():
        ratio = evaluation.ratio(name)
        best = name == evaluation.best_baseline
        lr = "" if run.tuned is None else f"{run.tuned.lr:.3g}" + ("*" if run.tuned.stepped_down else "")
        table.add_row(
            LABELS.get(name, name),
            lr,
            f"{run.final_loss:.3g} ± {run.final_standard_error:.2g}",
            "1" if best else f"{ratio.value:.3f}",
            "" if best else f"[{ratio.low:.3f}, {ratio.high:.3f}]",
            "" if best else f"{ratio.won:.0%}",
            style="bold" if name in evaluation.learned else None,
        )
    table.caption = "±: standard error; won: share of the functions on which it ends lower"
    if "minibatch" in evaluation.measures:
        table.caption += (
            "\nthe loss is that of the last point on fixed data: those trained on, unless the problem holds some out"
        )
    if any(run.tuned is not None and run.tuned.stepped_down for run in evaluation.baselines.values()):
        table.caption += "\n* the tuned learning rate diverges here, so a lower one is used"
    return table


def measures_table(evaluation: Evaluation) -> Table:
    """The same runs by every other measure."""
    names = {"minibatch": "minibatch", "test": "test data", "mean": "whole run"}
    shown = [measure for measure in names if measure in evaluation.measures]
    table = _table(
        "other measures, with ratios to the best baseline by each",
        caption="minibatch: mean of the last 5 points; whole run: of all",
    )
    table.add_column("optimizer", no_wrap=True)
    for measure in shown:
        best = LABELS[evaluation.best_baseline_by(measure)]
        table.add_column(f"{names[measure]}\n(/ {best})", justify="right", no_wrap=True)
    for name, run in evaluation.runs.items():
        cells = [
            f"{mean_of(run.measures[measure]):.3g} ({evaluation.ratio(name, measure).value:.3f})" for measure in shown
        ]
        table.add_row(LABELS.get(name, name), *cells, style="bold" if name in evaluation.learned else None)
    return table


def architectures_table(evaluations: Mapping[tuple[int, int], Evaluation]) -> Table:
    """Final losses by hidden layers and units, and the ratio of the learned rule to the best baseline."""
    some = next(iter(evaluations.values()))
    table = _table(
        f"loss at step {some.steps} by architecture, mean over {some.functions} fresh networks",
        caption="ratio: to the best baseline of that architecture, with its 95 % interval",
    )
    for column in ("layers", *(LABELS[name] for name in some.runs), "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    (learned,) = some.learned
    for (layers, width), evaluation in evaluations.items():
        ratio = evaluation.ratio(learned)
        table.add_row(
            " x ".join([str(width)] * layers),
            *(f"{run.final_loss:.3g}" for run in evaluation.runs.values()),
            f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        )
    return table


def timing_table(timings: list[Timing]) -> Table:
    """Nanoseconds per coordinate and step, and how much faster than eager."""
    table = _table(f"speed: ns per coordinate and step, {_threads(timings[0].threads)}")
    table.add_column("what")
    table.add_column("coordinates", justify="right")
    table.add_column("steps", justify="right")
    names = list(timings[0].nanoseconds)
    for name in names:
        table.add_column(name, justify="right")
    for timing in timings:
        eager = timing.nanoseconds["eager"]
        cells = [
            f"{value:.0f}" + ("" if name == "eager" else f"  ({eager / value:.1f}x faster)")
            for name, value in timing.nanoseconds.items()
        ]
        table.add_row(timing.what, f"{timing.coordinates:,}", str(timing.steps), *cells)
    return table


def numerics_table(comparison: Comparison) -> Table:
    """Errors of a backend and of float32 eager against float64."""
    table = _table(
        f"numerics: largest error against float64, {describe(comparison.preprocess)}, "
        f"{comparison.coordinates:,} coordinates",
        caption="eager: float32 PyTorch with autograd; relative: to the largest magnitude there;\n"
        "ratio: of the errors, each counted as at least half an ulp of that magnitude",
    )
    for column in ("run", "quantity"):
        table.add_column(column)
    for column in (comparison.backend, "relative", "eager", "relative", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    run = ""
    for row in comparison.rows:
        label = {"step": "one step", "unroll": f"{comparison.steps} steps"}[row.run] if row.run != run else ""
        if label and run:
            table.add_section()
        run = row.run
        cells = [f"{value:.1e}" for error in (row.fused, row.eager) for value in (error, error / row.scale)]
        table.add_row(label, row.quantity, *cells, f"{row.ratio:.2f}")
    return table


def precision_table(drifts: Sequence[Drift]) -> Table:
    """How far one rule's parameters drift under each form of storing the state."""
    *_, last = drifts[0].drift
    table = _table(
        f"drift of the parameters by steps, rule {drifts[0].rule}",
        caption="distance from the exact parameters over the way that those went; spread: over\n"
        "their spread, at the last step; exact: float64 arithmetic\n"
        f"bounds at 300 steps: {FLOAT16_BOUND:g} for float16, {NARROW_BOUND:g} for fewer bits",
    )
    for column in ("by", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("bits", *map(str, drifts[0].drift), "spread"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in drifts:
        cells = [f"{value:.1e}" for value in (*one.drift.values(), one.spread[last])]
        table.add_row(one.backend, one.form, f"{one.bits:g}", *cells)
    return table


def state_losses_table(losses: Sequence[StateLoss]) -> Table:
    """What loss rules reach under each form of storing the state."""
    table = _table(
        "loss of shipped rules on their own problems",
        caption="mean and standard error; difference to float32 on the same functions and minibatches",
    )
    for column in ("rule", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("loss", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in losses:
        difference = "" if one.form == "float32" else f"{one.difference:+.4f} ± {one.difference_error:.4f}"
        table.add_row(one.rule, one.form, f"{one.loss:.4f} ± {one.error:.4f}", difference)
    return table


def kernel_resources_table(analyses: Sequence[Analysis]) -> Table:
    """What each kernel occupies on one architecture."""
    capability = analyses[0].capability
    table = _table(
        f"kernels compiled for sm_{capability} ({ARCHITECTURES[capability].name})",
        caption="registers and spilled bytes of a thread, shared memory of a program, resident warps of an SM\n"
        "barriers: per tile of coordinates",
    )
    table.add_column("kernel")
    for column in ("registers", "spilled B", "shared KB", "warps", "barriers"):
        table.add_column(column, justify="right", no_wrap=True)
    for analysis in analyses:
        table.add_row(
            analysis.name,
            str(analysis.registers),
            str(analysis.spill_bytes),
            f"{analysis.shared_memory / 1024:.1f}",
            str(analysis.resident_warps),
            str(analysis.barriers),
        )
    return table


def kernel_costs_table(analyses: Sequence[Analysis]) -> Table:
    """What a coordinate costs in each kernel on one architecture, and the time predicted for it."""
    predicted = analyses[0].capability == H200.capability
    caption = (
        "clk: clocks of an SM at full rate to issue instructions, for special functions, in the tensor cores\n"
        "bytes: through shared and global memory in all lanes, those that lanes repeat included"
    )
    if predicted:
        caption += (
            f"\nfloor: what has to move, at the {H200.copy_bandwidth / 1000:g} TB/s of a plain copy on an {H200.name}"
            "\npredicted: by a simple model for that device, not measured"
        )
    table = _table("cost per coordinate, in the backward per coordinate and step", caption=caption)
    table.collapse_padding = True
    table.add_column("kernel")
    columns = ["issue\nclk", "special\nclk", "tensor\nclk", "shared\nB", "global\nB"]
    for column in columns + (["floor\nns", "predicted\nns"] if predicted else []):
        table.add_column(column, justify="right", no_wrap=True)
    for analysis in analyses:
        work = analysis.work
        clocks = (work.issue_clocks, work.special_clocks, work.tensor_clocks)
        cells = [f"{value:.1f}" for value in clocks] + [f"{work.shared_bytes:.0f}", f"{work.global_bytes:.0f}"]
        if analysis.prediction is not None:
            cells += [f"{analysis.prediction.floor:.3f}", f"{analysis.prediction.nanoseconds:.3f}"]
        table.add_row(analysis.name, *cells)
    return table


def search_table(result: SearchResult) -> Table:
    """Trials of a search in the order they were made."""
    table = _table("learning rates tried")
    table.add_column("lr", justify="right")
    table.add_column("best validation loss", justify="right")
    for trial in result.trials:
        best = trial.lr == result.best_lr
        table.add_row(f"{trial.lr:.3g}", f"{trial.validation_loss:.4g}", style="bold" if best else None)
    return table


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """What a rule is fed, what it does and what its training sees, over the segments of a run."""
    table = _table("diagnosis")
    table.add_column("quantity")
    table.add_column("from the start of a run to its end", no_wrap=True)

    def over_run(values: Tensor) -> str:
        picked = torch.linspace(0, len(values) - 1, min(len(values), 6)).round().long()
        return "  ".join(f"{value:.3g}" for value in values[picked].tolist())

    table.add_row("loss", over_run(diagnosis.losses))
    table.add_row("cosine of update and -gradient", over_run(diagnosis.cosine))
    table.add_row("|update| / |theta|", over_run(diagnosis.relative_update))
    table.add_row("meta-gradient norm", over_run(diagnosis.meta_gradient_norms))
    table.add_section()
    for index, histogram in enumerate(diagnosis.features):
        table.add_row(f"feature {index}", _sparkline(histogram))
    for layer in ("1", "2"):
        shares = {name: share for name, share in diagnosis.saturation.items() if name.startswith(layer)}
        table.add_row(
            f"saturated gates, layer {layer}", "  ".join(f"{name[2:]} {share:.0%}" for name, share in shares.items())
        )
    table.caption = diagnosis.verdict()
    return table


def _sparkline(histogram: Histogram) -> str:
    """A histogram on a log scale as a line of blocks between its limits."""
    heights = histogram.counts.double().log1p()
    top = max(float(heights.max()), 1.0)
    blocks = "".join(" ▁▂▃▄▅▆▇█"[round(8 * height / top)] for height in heights.tolist())
    return f"{histogram.edges[0]:.3g} {blocks} {histogram.edges[-1]:.3g}"


def info_table(facts: Mapping[str, str]) -> Table:
    """Names and what is known about them, without borders."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, fact in facts.items():
        table.add_row(name, fact)
    return table


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
