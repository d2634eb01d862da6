"""How far scores move when nothing that matters is changed: the noise floor of a model (`kind=noise`).

A few cells run as the settings say, then again with another batch size, number of threads, kernel or
dtype, one change at a time. Each of these variants is an ordinary run in a folder of its own below
variants/, so that a killed one resumes and each can be reported; noise.json lists them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from harness.executors.executor import Loaded
from harness.failures import SamplesFailed
from harness.lock import check_writer, only_writer
from harness.plan.show import print_plan, told_of_downloads
from harness.results import Results
from harness.runner import left, run
from harness.settings import Settings
from harness.start import usable_processors
from harness.variants import BASE, FILE, FOLDER, UNPACKED, Listed, Variants
from kvmerge.errors import Infeasible, NotFinite, UserError
from kvmerge.files import remove_leftovers, write_atomically
from kvmerge.kernels.choice import products_by
from kvmerge.kernels.forced import forced, obstacle
from kvmerge.models import Outline, load

_PLAIN: Any = {"highlight": False, "markup": False, "soft_wrap": True}


@dataclass(frozen=True)
class Variant:
    """One run of the cells: the base, or the base with one change."""

    name: str
    """Of its folder."""
    setting: str
    """What is changed: `batch_size`, `threads`, `kernel`, `dtype`; empty for the base."""
    settings: Settings
    threads: int | None = None
    """Threads of torch; None: as they are."""
    kernel: str | None = None
    """Kernel that prompts are attended to by; None: the fastest here."""
    obstacle: str = ""
    """Why it cannot run here; empty where it can, as far as is known."""

    @contextlib.contextmanager
    def in_force(self, products: str | None) -> Iterator[None]:
        """Have its threads and its kernel inside the block, and torch's threads as before after it.

        Args:
            products: the library that multiplied in the base. With other threads another one may be
                the faster, and that would be a second change.
        """
        before = torch.get_num_threads()
        with products_by(products), forced(self.kernel) if self.kernel else contextlib.nullcontext():
            try:
                torch.set_num_threads(self.threads or before)
                yield
            finally:
                torch.set_num_threads(before)


def noise(settings: Settings, console: Console) -> None:
    """Run the base and every variant, and say how far they are apart.

    Raises:
        UserError: if the base cannot be run, or a setting cannot be taken. What a variant cannot do
            here is said, and the others go on.
    """
    variants = planned(settings)
    if settings.dry_run:
        check_writer(settings.output_dir)
        _print_plan(variants, console)
        return
    with only_writer(settings.output_dir):
        remove_leftovers(settings.output_dir)
        known = _check_all(variants, downloads=True)  # what a run would refuse: before the first one
        variants = _run_all(variants, known, console)
        _write(settings, variants)
        _report(settings, console)


def planned(settings: Settings) -> list[Variant]:
    """Return the base and its variants, those that need the same weights together.

    Raises:
        UserError: for settings that no run of this kind can take.
    """
    vary = settings.vary
    assert vary is not None
    if settings.num_shards > 1:
        raise UserError(
            f"num_shards={settings.num_shards}: a noise floor is measured by one process. Leave it out."
        )
    if not any(cell.is_full for cell in settings.cells):
        raise UserError("a noise floor is that of the full cache too: add full@1 to the cells.")
    if (settings.output_dir / "predictions").exists():
        raise UserError(
            f"{settings.output_dir} holds predictions of another kind of run. Choose another "
            "output_dir."
        )
    dtype, device = settings.model.dtype, settings.model.torch_device()
    threads = vary.threads
    if threads is None:
        threads = [2**power for power in range(usable_processors().bit_length())]
    variants = [Variant(BASE, "", _below(settings, BASE))]
    variants += [
        Variant(name, "batch_size", _below(settings, name, batch_size=size))
        for size in dict.fromkeys(vary.batch_sizes)
        if size != settings.batch_size and (name := f"batch-{size}")
    ]
    variants += [
        Variant(
            name,
            "threads",
            _below(settings, name),
            threads=count,
            obstacle="" if device.type == "cpu" else f"the model computes on {device.type}",
        )
        for count in dict.fromkeys(threads)
        if count != torch.get_num_threads() and (name := f"threads-{count}")
    ]
    kernels = dict.fromkeys(vary.kernels)
    variants += [
        Variant(
            name,
            "kernel",
            _below(settings, name),
            kernel=name,
            obstacle=obstacle(name, device, getattr(torch, dtype)),
        )
        for name in kernels
        if name != UNPACKED
    ]
    if UNPACKED in kernels:
        why = "" if _packs(settings) else "linear layers are not packed here"
        below = _below(settings, UNPACKED, pack_weights=False)
        variants.append(Variant(UNPACKED, "kernel", below, obstacle=why))
    for name in dict.fromkeys(vary.dtypes):
        if name != dtype:
            variants.append(_of_dtype(settings, name))
    return variants


def _of_dtype(settings: Settings, dtype: str) -> Variant:
    try:
        return Variant(dtype, "dtype", _below(settings, dtype, dtype=dtype))
    except UserError as error:  # quantized weights compute in one dtype
        return Variant(dtype, "dtype", settings, obstacle=str(error))


def _packs(settings: Settings) -> bool:
    model = settings.model
    on_cpu = model.torch_device().type == "cpu" and model.dtype == "float32"
    return model.pack_weights and on_cpu and torch.backends.mkldnn.is_available()


def _below(
    settings: Settings, name: str, *, batch_size: int | None = None, **of_model: Any
) -> Settings:
    """Return the settings of a variant, in its own folder, with what is changed."""
    resolved = dict(settings.resolved)
    resolved["model"] = dict(resolved["model"]) | of_model
    if batch_size is not None:
        resolved["batch_size"] = batch_size
    return replace(
        settings,
        model=replace(settings.model, **of_model),
        batch_size=batch_size or settings.batch_size,
        output_dir=settings.output_dir / FOLDER / name,
        resolved=resolved,
    )


def _check_all(variants: Sequence[Variant], *, downloads: bool) -> Outline | None:
    """Make the checks of every variant; return the model's outline, None where nothing is left.

    Raises:
        UserError: as a run of the variant would.
    """
    known = None
    for variant in variants:
        if not variant.obstacle:
            known = left(variant.settings, known, downloads=downloads).model or known
    return known


def _run_all(variants: Sequence[Variant], known: Outline | None, console: Console) -> list[Variant]:
    """Run what has no line yet; return the variants with what turned out to stand in their way."""
    weights = _Weights(known)
    products = None
    done = []
    for number, variant in enumerate(variants, start=1):
        what = f"variant {number} of {len(variants)}: {variant.name}"
        if not variant.obstacle and variant.kernel == f"tiled-{products}":
            variant = replace(variant, obstacle="the kernel of the base")
        if variant.obstacle:
            console.print(f"{what}: not run, {variant.obstacle}", **_PLAIN)
            done.append(variant)
            continue
        console.print(what, **_PLAIN)
        try:
            with only_writer(variant.settings.results_dir), variant.in_force(products):
                results = _run(variant, weights)
        except (RuntimeError, Infeasible) as error:
            if variant.name == BASE or not _is_not_for_here(error):
                raise
            variant = replace(variant, obstacle=_said(error)[0])
            console.print(f"{what}: given up, {variant.obstacle}", **_PLAIN)
        else:
            products = products or _products(results)
        done.append(variant)
    return done


def _run(variant: Variant, weights: _Weights) -> Results:
    settings = variant.settings
    remove_leftovers(settings.results_dir)
    is_left = left(settings, weights.known).jobs
    results = run(settings, loaded=weights.of(settings) if is_left else None)
    results.failures.check()
    return results


class _Weights:
    """The model of the last variant that needed one: the next mostly needs the same."""

    def __init__(self, known: Outline | None) -> None:
        self.known = known
        self._key: tuple[str, bool] | None = None
        self._loaded: Loaded | None = None

    def of(self, settings: Settings) -> Loaded:
        key = settings.model.dtype, settings.model.pack_weights
        if self._loaded is None or key != self._key:
            self._loaded = None  # two of them may not fit into memory
            self._loaded, self._key = load(settings.model, self.known), key
        return self._loaded


def _is_not_for_here(error: Exception) -> bool:
    """Return whether an error says that this device cannot compute so, and not that a run is broken."""
    return isinstance(error, Infeasible) or all(
        any(sign in text for sign in _NOT_FOR_HERE) for text in _said(error)
    )


def _said(error: Exception) -> list[str]:
    """Return what an error says: of samples that failed, each for itself."""
    return [each.error for each in error.failures] if isinstance(error, SamplesFailed) else [str(error)]


_NOT_FOR_HERE = ("not implemented", "No available kernel", NotFinite.__name__)


def _products(results: Results) -> str:
    """Return the library that multiplied in a run's tiled attention."""
    records = (
        record
        for task in results.info["tasks"]
        for cell in results.info["cells"]
        for record in results.records(task, cell)
    )
    return "onednn" if any("tiled-onednn" in (record.kernel or "") for record in records) else "torch"


def _print_plan(variants: Sequence[Variant], console: Console) -> None:
    can_run = [variant for variant in variants if not variant.obstacle]
    base = variants[0].settings
    with told_of_downloads(base, console):
        known = _check_all(variants, downloads=False)
        print_plan(base, console, left(base, known))
    console.print(
        f"{len(can_run)} such runs, each of which resumes: {', '.join(v.name for v in can_run)}",
        **_PLAIN,
    )
    for variant in variants:
        if variant.obstacle:
            console.print(f"not run: {variant.name}, {variant.obstacle}", **_PLAIN)


def _write(settings: Settings, variants: Sequence[Variant]) -> None:
    content: Variants = {
        "model": settings.model.name,
        "benchmark": settings.benchmark.name,
        "variants": [
            Listed(name=variant.name, setting=variant.setting, obstacle=variant.obstacle)
            for variant in variants
        ],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(settings.output_dir / FILE, text + "\n")


def _report(settings: Settings, console: Console) -> None:
    from harness.report.page import report_noise  # matplotlib and scipy are slow to import

    report_noise(settings.output_dir, console)
    for path in (f"{FOLDER}/", "tables/"):
        console.print(f"  {settings.output_dir / path}", **_PLAIN)
