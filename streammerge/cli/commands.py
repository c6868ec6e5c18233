"""One function for each command: parse what is left to parse, call the library, show the result."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

from streammerge import api
from streammerge.cli.jobs import Job, read_jobs
from streammerge.cli.main import options_of, required
from streammerge.cli.output import Output
from streammerge.cli.show import plan_text, status_text
from streammerge.core.errors import UsageError
from streammerge.core.text import count_text, printable, size_text, some_of
from streammerge.progress import Bar, duration_text
from streammerge.report import Report
from streammerge.stream import Event, Progress, silent


def run(arguments: argparse.Namespace, output: Output) -> None:
    """`streammerge run`: one job from the arguments, or all jobs of a file in order."""
    for job in _jobs(arguments):
        if arguments.dry_run:
            _show_plan(job, output)
        else:
            _run_job(job, output, verify=not arguments.no_verify)


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    if arguments.config:
        if arguments.base or arguments.adapters or arguments.weight:
            reason = "`--config` holds base, adapters and weights itself"
            raise UsageError(reason, "give either a job file or BASE and ADAPTER")
        return read_jobs(Path(arguments.config), options_of(arguments), arguments.output)
    base, adapters = required(arguments.base, "BASE"), required(arguments.adapters, "ADAPTER")
    return [Job(base, adapters, arguments.output, arguments.weight, options_of(arguments))]


def _run_job(job: Job, output: Output, *, verify: bool) -> None:
    target = required(job.output, "`--output`")
    bar = None if output.quiet or output.json else Bar()
    progress: Progress = bar or (_json_progress(output) if output.json else silent)
    try:
        report = api.merge(
            job.base, job.adapters, target, weights=job.weights, verify=verify, progress=progress, **job.options
        )
    finally:
        if bar:
            bar.close()
    for note in report.notes:
        output.note(note)
    if code := report.document["code"]:
        output.note(f"copied with the model, for loaders that may run it: {some_of(code)}; `--no-code` leaves it out")
    output.say(_sentence(report))
    if output.verbose and report.io:
        output.say(f"weights were written with {report.io} I/O")
    output.line("summary", report.as_data())
    output.result(str(report.output))


def _json_progress(output: Output) -> Progress:
    lock = threading.Lock()  # two workers may finish a file at once

    def show(event: Event) -> None:
        with lock:
            if event.kind == "shard":
                shard = {"file": event.file, "bytes": event.bytes, "number": event.number, "count": event.count}
                output.line("shard", shard)
            elif event.kind == "start":
                output.line("start", {"bytes": event.bytes, "shards": event.count})
            elif event.kind == "reread":
                output.line("reread", {"bytes": event.bytes})
            elif event.kind == "resume":
                output.line("resume", {"bytes": event.bytes, "blocks": event.count})

    return show


def _sentence(report: Report) -> str:
    if report.status == "already complete":
        return "already complete: this very merge is there and finished; `streammerge verify` reads its weights again"
    written = sum(item["size"] for item in report.document["files"].values())
    words = [
        f"{count_text(report.changed, 'tensor')} changed",
        f"{size_text(written)} written{' and checked' if report.checked else ''} in {duration_text(report.seconds)}",
    ]
    if report.without_effect:
        words.insert(1, f"{report.without_effect} targeted without effect (B = 0)")
    if report.rederived:
        words.append(f"{count_text(report.rederived, 'block')} read back and derived again")
    lost = _least_survived(report)
    return "; ".join(words) + (f"\n{lost}" if lost else "")


def _least_survived(report: Report) -> str:
    """A warning in numbers where rounding took a large part of some delta."""
    shares = {
        name: item["survived"] for name, item in report.document["tensors"].items() if item.get("survived") is not None
    }
    if not shares or min(shares.values()) >= 0.9:
        return ""
    name = min(shares, key=lambda key: shares[key])
    few = sum(share < 0.9 for share in shares.values())
    return (
        f"rounding to the output's dtype took more than a tenth of the delta of {count_text(few, 'tensor')}; "
        f"least is left of `{printable(name)}`: {shares[name]:.0%}. `--dtype float32` keeps all of it"
    )


def plan(arguments: argparse.Namespace, output: Output) -> None:
    """`streammerge plan`: the plan, for people or as JSON."""
    base, adapters = required(arguments.base, "BASE"), required(arguments.adapters, "ADAPTER")
    _show_plan(Job(base, adapters, arguments.output, arguments.weight, options_of(arguments)), output)


def _show_plan(job: Job, output: Output) -> None:
    made = api.plan(job.base, job.adapters, weights=job.weights, **job.options)
    output.document(made.as_data())
    output.result(plan_text(made, job.output, verbose=output.verbose))


def inspect(arguments: argparse.Namespace, output: Output) -> None:
    """`streammerge inspect`: the modules of an adapter; exit 4 if it cannot be merged."""
    status = api.inspect(arguments.adapter, arguments.base, **options_of(arguments))
    output.document(status.as_data())
    output.result(status_text(status, verbose=output.verbose))
    if status.refusal:
        raise status.refusal


def verify(arguments: argparse.Namespace, output: Output) -> None:
    """`streammerge verify`: the proof, or every problem found."""
    bar = None if output.quiet or output.json else Bar()
    options: dict[str, Any] = options_of(arguments)
    try:
        report = api.verify(
            arguments.output,
            base=arguments.base,
            adapters=arguments.adapter,
            sample=arguments.sample,
            full=arguments.full,
            subset=arguments.subset,
            progress=bar or silent,
            **options,
        )
    finally:
        if bar:
            bar.close()
    for note in report.notes:
        output.note(note)
    output.document(report.as_data())
    rederived = f", {count_text(report.rederived, 'block')} derived again from the inputs" if report.rederived else ""
    output.result(f"{report.output}: verified, {count_text(report.checked, 'block')} checked{rederived}")


def status(arguments: argparse.Namespace, output: Output) -> None:
    """`streammerge status`: what is there, for people or as JSON."""
    found = api.status(arguments.output)
    output.document(found.as_data())
    output.result(str(found))
