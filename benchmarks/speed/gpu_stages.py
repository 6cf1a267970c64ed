"""The stages of gpu_acceptance.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]


class Options(NamedTuple):
    """The command line's options for every stage."""

    out: Path
    """The folder of the results."""
    small: bool
    """The same steps, tiny, on the CPU."""
    r2dreamer: Path | None
    """A checkout."""
    keep: Callable[[Any], None]
    """Write down what a stage has so far: it is not lost if the stage is cut."""
    deadline: float
    """When the stage must be done, by :func:`time.monotonic`."""

    @property
    def device(self) -> str:
        """Where the stages compute."""
        return "cpu" if self.small else "cuda"

    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class Rows(dict[str, Any]):
    """A stage's rows by name; each is written at once, and one that raises stops no other.

    Args:
        options: Of the stage.
    """

    def __init__(self, options: Options):
        super().__init__()
        self._options = options

    def add(self, name: str, make: Callable[[], Any]) -> None:
        """Make a row, or note the error and where it was raised."""
        begin = time.perf_counter()
        try:
            row = make()
        except Exception as error:  # noqa: BLE001  # whatever a GPU says is a result
            where = traceback.format_exc().splitlines()
            row = {"failed": f"{type(error).__name__}: {str(error)[:600]}", "trace": where[-14:]}
        row["seconds"] = round(time.perf_counter() - begin, 2)
        self[name] = row
        self._options.keep(self)


def failures(result: Any) -> int:
    """Rows of a stage's result that failed."""
    if not isinstance(result, dict):
        return 0
    return int("failed" in result) + sum(failures(value) for value in result.values())


# ---------------------------------------------------------------- environment, smoke


def environment(options: Options) -> dict[str, Any]:
    """Versions, the device, and what it multiplies and copies."""
    from learner import make_clock, product_gflops

    device = options.device
    clock = make_clock(device)
    rates = {"float32": round(product_gflops(device, torch.float32, clock))}
    if device == "cpu":
        return {"product_gflops": rates}
    rates["bfloat16"] = round(product_gflops(device, torch.bfloat16, clock))
    memory = torch.cuda.get_device_properties(0).total_memory
    return {"cuda": torch.version.cuda, "memory_gib": memory >> 30, "product_gflops": rates}


def smoke(options: Options) -> dict[str, Any]:
    """One tiny update of each latent and precision; capture with and without compilation."""
    rows = Rows(options)
    for latent in ("split", "whole", "shared", "foreground"):
        for precision in ("float32", "bfloat16"):
            rows.add(
                f"{latent}, {precision}", lambda a=latent, b=precision: _tiny_update(options, a, b)
            )
    if options.device == "cuda":
        for latent in ("split", "whole"):
            rows.add(
                f"{latent}, captured without compilation",
                partial(_tiny_update, options, latent, "bfloat16", capture=True),
            )
        auto = partial(_tiny_update, options, "split", "bfloat16", execution="auto")
        rows.add("auto", auto)
        rows.add("copies overlapped with updates", partial(_copies, options))
    return rows


def _tiny_update(
    options: Options,
    latent: str,
    precision: str,
    *,
    capture: bool = False,
    execution: str = "eager",
) -> dict[str, Any]:
    from execution_equality import make_batch
    from learner import ACTION_SIZE
    from tiny_run import TINY

    from w2f_torchrl.config import OptimizerConfig
    from w2f_torchrl.trainers import Learner

    torch.manual_seed(0)
    learner = Learner(
        TINY,
        action_size=ACTION_SIZE,
        image_size=16,
        latent=latent,
        device=options.device,
        execution=execution,
        optimizer=OptimizerConfig(precision=precision),
    )
    if capture:
        learner._update = learner._modes.graphed()
    for number in range(3):
        metrics = learner.update(make_batch(number, 3, 6, 16, options.device))
    missing = [n for n, p in learner.loss.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise AssertionError(f"no gradient: {missing}")
    values = {name: float(value) for name, value in metrics.items()}
    if values["finite"] != 1 or not learner.is_finite():
        raise AssertionError(f"not finite: {values}")
    saved = learner.state_dict()
    learner.load_state_dict(saved)
    learner.update(make_batch(3, 3, 6, 16, options.device))
    return {"total_loss": values["wm/total_loss"], "mode": learner.mode}


def _copies(options: Options) -> dict[str, Any]:
    from execution_equality import make_batch

    from w2f_torchrl.data.device_copy import DeviceCopy

    copy = DeviceCopy(torch.device("cuda"))
    samples = [make_batch(number, 16, 16, 64, "cpu").pin_memory() for number in range(8)]
    sums = []
    for sample in samples:
        torch.cuda._sleep(10_000_000)
        sums.append(copy(sample)["next", "pixels"].double().sum())
    wrong = sum(
        total.item() != sample["next", "pixels"].double().sum().item()
        for total, sample in zip(sums, samples, strict=True)
    )
    if wrong:
        raise AssertionError(f"{wrong} of {len(samples)} copies differ")
    return {"copies": len(samples)}


# ---------------------------------------------------------------- times


def learner(options: Options) -> dict[str, Any]:
    """Milliseconds, kernels and memory of an update: 12m, 16 x 64, bfloat16, each mode."""
    rows = Rows(options)
    cases = (
        [("split", "eager")]
        if options.small
        else [
            ("split", "cuda_graph_parallel"),
            ("whole", "cuda_graph"),
            ("split", "cuda_graph"),
            ("split", "eager"),
            ("split", "compile"),
            ("whole", "eager"),
            ("whole", "compile"),
        ]
    )
    for latent, mode in cases:
        if options.seconds_left() < 15:
            rows[f"{latent}, {mode}"] = {"left_out": "no time left"}
            continue
        rows.add(f"{latent}, {mode}", partial(_time_learner, options, latent, mode))
        _free_memory(options)
    return rows


def _shape(options: Options) -> dict[str, Any]:
    if options.small:
        return {"model": "size1m", "batch": 2, "length": 4, "rounds": 2, "precision": "float32"}
    return {"model": "size12m", "batch": 16, "length": 64, "rounds": 20, "precision": "bfloat16"}


def _time_learner(options: Options, latent: str, mode: str) -> dict[str, Any]:
    from learner import ACTION_SIZE, make_sample
    from tensordict import TensorDict

    from w2f_torchrl.config import OptimizerConfig
    from w2f_torchrl.data.replay.latents import latent_fields
    from w2f_torchrl.modules import PRESETS
    from w2f_torchrl.modules.packed_latents import INITIAL
    from w2f_torchrl.trainers import Learner

    shape = _shape(options)
    made = Learner(
        PRESETS[shape["model"]],
        action_size=ACTION_SIZE,
        latent=latent,
        execution=mode,
        device=options.device,
        optimizer=OptimizerConfig(precision=shape["precision"]),
    )
    sample = make_sample(shape["batch"], shape["length"], options.device)
    fields = latent_fields(made.world_model.config, latent)
    sample[INITIAL] = TensorDict(  # as a replay that keeps latents gives them
        {
            name: torch.zeros(*sample.shape, *field.shape, dtype=field.torch_dtype)
            for name, field in fields.items()
        },
        sample.shape,
    ).to(options.device)
    return _time(options, made.update, sample, shape["rounds"] if mode != "eager" else 5)


def _time(
    options: Options, update: Callable[[Any], Any], sample: Any, rounds: int
) -> dict[str, Any]:
    """First call, median of further ones, memory and kernels."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = _seconds(options, lambda: update(sample.clone()))
    _seconds(options, lambda: update(sample.clone()))
    times = [_seconds(options, lambda: update(sample.clone())) for _ in range(rounds)]
    row: dict[str, Any] = {
        "first_seconds": round(first, 2),
        "milliseconds": round(1000 * statistics.median(times), 3),
        "fastest": round(1000 * min(times), 3),
        "slowest": round(1000 * max(times), 3),
    }
    if options.device == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        row |= _kernels(lambda: update(sample.clone()))
    return row


def _seconds(options: Options, work: Callable[[], Any]) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _kernels(work: Callable[[], Any]) -> dict[str, Any]:
    """Kernels of one call, and which take the time; nothing where the profiler can't be used."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    except Exception as error:  # noqa: BLE001  # the profiler is not part of the measurement
        return {"kernels": f"not counted: {error}"}
    spent: dict[str, list[float]] = {}
    for event in events:
        spent.setdefault(event.name[:80], []).append(event.device_time)
    top = sorted(spent.items(), key=lambda item: -sum(item[1]))[:45]
    return {
        "kernels": len(events),
        "kernel_milliseconds": round(sum(map(sum, spent.values())) / 1000, 3),
        "top": [[name, len(times), round(sum(times) / 1000, 3)] for name, times in top],
    }


def _free_memory(options: Options) -> None:
    import gc

    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()


def convolutions(options: Options) -> dict[str, Any]:
    """Transposed convolutions of the decoder, forward and backward: cuDNN's, and on subpixels."""
    from torch.nn import functional as F

    from w2f_torchrl.kernels.convolution import subpixel_convolution

    def transposed(x: Any, weight: Any) -> Any:
        return F.conv_transpose2d(x, weight, None, 2, 2)

    rows = Rows(options)
    pictures = 2 if options.small else 1024
    for channels, out, side in ((128, 128, 4), (128, 96, 8), (96, 64, 16), (64, 4, 32)):
        x = torch.randn(pictures, channels, side, side, device=options.device)
        x = x.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(channels, out, 6, 6, device=options.device, dtype=torch.bfloat16)
        weight.requires_grad_()
        for name, convolve in (("transposed", transposed), ("subpixels", subpixel_convolution)):

            def both(convolve: Callable[..., Any] = convolve, x: Any = x, w: Any = weight) -> None:
                y = convolve(x, w)
                torch.autograd.grad(y, (x, w), torch.ones_like(y))

            def once(work: Callable[[], Any] = both) -> dict[str, Any]:
                for _ in range(3):
                    work()
                times = [_seconds(options, work) for _ in range(10)]
                return {"milliseconds": round(1000 * statistics.median(times), 3)}

            rows.add(f"{channels} to {out}, {side} x {side}, {name}", once)
    return rows


def render(options: Options) -> dict[str, Any]:
    """Frames a second with the simulator's mask, and that the mask covers something."""
    from w2f_torchrl.envs import make_env

    env = make_env("walker", "walk", distraction="easy")
    steps = 5 if options.small else 200
    env.rollout(2)
    begin = time.perf_counter()
    rollout = env.rollout(steps)
    seconds = time.perf_counter() - begin
    share = float(rollout["foreground_mask"].float().mean())
    env.close()
    if not 0.005 < share < 0.5:
        raise AssertionError(f"the mask covers {share:.4f} of the picture: wrong on this OpenGL.")
    return {"agent_steps_per_second": round(steps / seconds, 1), "mask_share": round(share, 4)}


# ---------------------------------------------------------------- equality


@contextmanager
def _exact() -> Iterator[None]:
    """Without TF32 and with deterministic convolutions, so that eager equals eager."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before


def equality(options: Options) -> dict[str, Any]:
    """Each mode against eager, update by update; eager against eager to judge by."""
    import execution_equality

    shape: dict[str, Any] = {"model": "size1m", "batch_size": 8, "batch_length": 32, "updates": 6}
    modes = ["cuda_graph_parallel", "cuda_graph", "eager", "compile"]
    if options.small:
        shape, modes = {"updates": 2}, ["eager"]

    def compare(mode: str) -> dict[str, Any]:
        rows = execution_equality.run([mode], latents=["split"], device=options.device, **shape)
        (row,) = rows.values()
        if not row["passed"]:
            row["failed"] = "differs from eager by more than rounding, or compiles again"
        return row

    rows = Rows(options)
    with _exact():
        for mode in modes:
            if options.seconds_left() < 20:
                rows[f"split, {mode}"] = {"left_out": "no time left"}
                continue
            rows.add(f"split, {mode}", partial(compare, mode))
            _free_memory(options)
    return rows


# ---------------------------------------------------------------- learning curves

#: Folder of the runs while they train; the kept files lie next to it.
RUNS = "runs"
#: What the curves have in common: one update per agent step of eight frames.
CURVES = [
    "experiment=cpu",
    "environment.task=swingup",
    "training.train_ratio=128",
    "optimizer.actor_lr=null",
    "environment.distraction=easy",
    "environment.num_envs=16",
    "collection.steps_per_batch=4",
    "collection.num_workers=8",
    "evaluation.filtering=false",
    "checkpoint.every_updates=1000000",
    "logging.report=false",
]
ON_CUDA = [
    "model=size12m",
    "device=cuda",
    "training.batch_size=16",
    "training.batch_length=64",
    "training.train_ratio=1024",
    "training.prefill_steps=1024",
    "training.total_frames=4000000",
    "optimizer.lr=2e-4",
    "evaluation.every_frames=12000",
    "evaluation.episodes=4",
    "logging.every_updates=50",
    "logging.images_every_updates=500",
    "logging.histograms_every_updates=0",
]
TINY_RUN = [
    "device=cpu",
    "environment.num_envs=2",
    "collection.num_workers=1",
    "training.batch_size=2",
    "training.batch_length=4",
    "training.train_ratio=1",
    "training.prefill_steps=8",
    "training.total_frames=256",
    "evaluation.every_frames=0",
    "logging.every_updates=1",
    "logging.images_every_updates=2",
]
#: Seconds before the deadline at which the runs are asked to end, for a checkpoint and pictures.
LANDING = 25


def curves(options: Options) -> dict[str, Any]:
    """Learning curves of World2Filter and DreamerV3, side by side until the time is up."""
    cases = {"world2filter": ["algo=world2filter"], "dreamer_v3": ["algo=dreamer_v3"]}
    runs = options.out / RUNS
    running: dict[str, subprocess.Popen[bytes]] = {}
    logs = {name: options.out / f"{name}.log" for name in cases}
    for name, overrides in cases.items():
        settings = [*CURVES, *(TINY_RUN if options.small else ON_CUDA), *overrides]
        command = [sys.executable, str(ROOT / "sota_configs" / "world2filter.py"), *settings]
        with logs[name].open("wb") as log:
            running[name] = subprocess.Popen(
                [*command, f"run_dir={runs / name}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    try:
        while options.seconds_left() > LANDING and any(p.poll() is None for p in running.values()):
            time.sleep(1)
        for process in running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in running.values():
            _wait(process, options.seconds_left() - 3)
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return {name: _curve(options, runs / name, running[name], logs[name]) for name in cases}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return


def _curve(
    options: Options, run_dir: Path, process: subprocess.Popen[bytes], log: Path
) -> dict[str, Any]:
    """What a run came to; its metrics and newest pictures are moved to the results' folder."""
    text = log.read_text(errors="replace")
    row: dict[str, Any] = {"exit_code": process.returncode}
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists() or not metrics.stat().st_size:
        return row | {"failed": "no metrics", "log": text[-3000:]}
    shutil.copy(metrics, options.out / f"{run_dir.name}.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    returns = [r["episode/return"] for r in rows if "episode/return" in r]
    evaluations = [(r["frames"], r["eval/return_mean"]) for r in rows if "eval/return_mean" in r]
    row |= {"frames": rows[-1]["frames"], "updates": rows[-1]["updates"]}
    row |= {"episode_returns": returns, "evaluations": evaluations, "log": text[-1500:]}
    row["mode"] = [line for line in text.splitlines() if "training.execution=auto" in line][-2:]
    _film_strip(run_dir / "images", options.out / f"{run_dir.name}.png")
    log.unlink()
    return row


def _film_strip(folder: Path, path: Path) -> None:
    """Stack the newest picture of each kind."""
    from PIL import Image

    newest = {p.stem.rsplit("_", 1)[0]: p for p in sorted(folder.glob("*.png"))}
    pictures = [Image.open(p).convert("RGB") for _, p in sorted(newest.items())]
    if not pictures:
        return
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, sum(p.height + 6 for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + 6
    sheet.save(path)


# ---------------------------------------------------------------- for a second time


def peers(options: Options) -> dict[str, Any]:
    """Milliseconds of an update of TorchRL's parts and stepper and, with a checkout, r2dreamer."""
    from learner import make_sample, stepper_update, torchrl_update
    from peers import r2dreamer_update

    shape = _shape(options)
    mixed, model, device = shape["precision"] == "bfloat16", shape["model"], options.device
    sample = make_sample(shape["batch"], shape["length"], device)
    bare = sample.exclude(("next", "foreground_mask"))
    made: dict[str, tuple[Callable[[], Callable[[Any], Any]], Any]] = {}
    if options.r2dreamer is not None:
        checkout = options.r2dreamer
        made["r2dreamer"] = (
            lambda: r2dreamer_update(checkout, model, device=device, mixed=mixed),
            sample,
        )
    made["torchrl_parts"] = (lambda: torchrl_update(model, device, mixed), bare)
    if device == "cuda":
        made["torchrl_stepper"] = (lambda: stepper_update(model, device, mixed, bare), bare)
    rows = Rows(options)
    for name, (make, data) in made.items():
        if options.seconds_left() < 10:
            break
        rows.add(name, lambda make=make, data=data: _time(options, make(), data, 5))
        _free_memory(options)
    return rows


def masks(options: Options) -> dict[str, Any]:
    """Frames per second of the student and of SAM3 with random weights."""
    from w2f_torchrl.segmenters import StudentNetwork, StudentSegmenter

    pixels = torch.randint(0, 256, (8 if options.small else 256, 3, 64, 64), dtype=torch.uint8)
    rows = Rows(options)
    student = StudentSegmenter(StudentNetwork(), device=options.device)
    rows.add("student", lambda: _rate(student, pixels))
    few = pixels[: 2 if options.small else 32]
    rows.add("sam3_random_weights", lambda: _rate(_random_sam3(options), few))
    return rows


def _rate(segmenter: Callable[[Any], Any], pixels: Any) -> dict[str, Any]:
    segmenter(pixels)
    begin = time.perf_counter()
    for _ in range(3):
        segmenter(pixels)  # ends with a copy to the host, so the device has finished
    return {"frames_per_second": round(3 * len(pixels) / (time.perf_counter() - begin), 1)}


def _random_sam3(options: Options) -> Any:
    """SAM3 with random weights: full-size or tiny."""
    import tempfile
    from dataclasses import asdict

    from w2f_torchrl.segmenters import Sam3Segmenter, sam3
    from w2f_torchrl.segmenters.sam3_requirements import find_vocabulary, require_package

    require_package()
    size = sam3.TINY if options.small else sam3.Sam3Architecture()
    model = sam3.build_sam3(size, resolution=None, vocabulary=find_vocabulary())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        torch.save({"architecture": asdict(size), "model": dict(model.state_dict())}, path)
        return Sam3Segmenter(["robot"], checkpoint=str(path), device=options.device)
