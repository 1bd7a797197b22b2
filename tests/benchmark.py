"""Measure the script on this machine, against the alternatives, in one run.

    python tests/benchmark.py                 both models; on 2 cores many minutes
    python tests/benchmark.py --quick         fewer rounds and clips
    python tests/benchmark.py --device cuda
    python tests/benchmark.py --smoke         about a minute, to see it run

Machines change their speed from one minute to the next. So every path runs in every round, and the
median of the rounds' ratios counts. transformers is measured where it is installed.
"""

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import reference  # noqa: E402
import standin  # noqa: E402

import encodec_tokenizer as script  # noqa: E402

CODEBOOKS = {"encodec_24khz": 8, "encodec_48khz": 4}  # at 6 kbps


def make_weights(name: str, folder: Path, sizes: tuple) -> Path:
    """A checkpoint of stand-in weights."""
    torch.save(standin.stand_in(name, CODEBOOKS[name], *sizes), folder / f"{name}.th")
    return folder / f"{name}.th"


def write_clips(folder: Path, lengths_s: list[float]) -> Path:
    """Clips at 44.1 kHz of these lengths, and their CSV, in Kaggle's layout."""
    (folder / "train_curated").mkdir(parents=True)
    audio = standin.varied_audio(44_100, 1, 40, 3).reshape(-1).numpy()
    rows = [("fname", "labels")]
    for number, length_s in enumerate(lengths_s):
        samples = np.resize(np.roll(audio, 10_000 * number), round(44_100 * length_s))
        name = f"{number:04d}.wav"
        soundfile.write(folder / "train_curated" / name, np.clip(samples, -1, 1), 44_100)
        rows.append((name, "x"))
    with (folder / "train_curated.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def curated_lengths(count: int) -> list[float]:
    """Lengths as train_curated's: 0.3 to 30 s, 7.6 s on average."""
    drawn = np.random.default_rng(1).lognormal(1.6, 0.95, count)
    return np.clip(drawn, 0.3, 30).tolist()


# ---------------------------------------------------------------------------------- whole processes


def process_seconds(command: list) -> tuple[float, float]:
    """Wall and CPU seconds of a process and its children."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_processes(weights: dict[str, Path], device: str, cases: list, rounds: int) -> None:
    """Print whole processes of the script beside a plain loop over Meta's model (plain_loop.py)."""
    print(f"\nwhole processes, imports included, medians of {rounds} interleaved rounds\n")
    print("| | this script | plain loop | ratio, wall | ratio, CPU |\n|---|---|---|---|---|")
    for name, count, *flags in tqdm(cases, desc="processes"):
        ours, plain = [], []
        with tempfile.TemporaryDirectory() as folder:
            clips = write_clips(Path(folder) / "input", curated_lengths(count))
            for number in range(rounds):
                out = Path(folder) / str(number)
                command = [ROOT / "encodec_tokenizer.py", "--input_dir", clips, "--output_dir", out]
                command += ["--model", name, "--weights", weights[name], "--device", device]
                ours.append(process_seconds([*command, *flags]))
                command = [ROOT / "tests" / "plain_loop.py", clips, name, weights[name], count]
                plain.append(process_seconds([*command, out / "csv", *flags]))
        wall, cpu = np.median(np.array(plain) / np.array(ours), axis=0)
        medians = [f"{np.median(np.array(times)[:, 0]):.1f} s" for times in (ours, plain)]
        case = f"{name[8:10]} kHz, {script.counted(count, 'clip')}{' --whole' if flags else ''}"
        print(f"| {case} | {' | '.join(medians)} | {wall:.2f} | {cpu:.2f} |", flush=True)


def peak_gb(command: list) -> float:
    """Peak memory of a process that a small one starts: a child's counts from its parent's."""
    small = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", small, sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1e6


def measure_memory(weights: dict[str, Path], device: str, cases: list) -> None:
    for name, count, length_s in cases:
        with tempfile.TemporaryDirectory() as folder:
            clips = write_clips(Path(folder) / "input", [length_s] * count)
            command = [ROOT / "encodec_tokenizer.py", "--input_dir", clips, "--output_dir", folder]
            command += ["--model", name, "--weights", weights[name], "--device", device, "--whole"]
            text = f"{script.counted(count, 'clip')} of {length_s:g} s, --whole, {name}"
            print(f"peak memory of {text}: {peak_gb(command):.2f} GB", flush=True)


# --------------------------------------------------------------------------------- paths to codes


def seconds(function: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def plain_path(model, batch_size: int) -> Callable[[torch.Tensor], np.ndarray]:
    def path(chunks: torch.Tensor) -> np.ndarray:
        frames = [model.encode(batch) for batch in chunks.split(batch_size)]
        return torch.cat([torch.cat([c for c, _ in f], dim=2) for f in frames]).cpu().numpy()

    return path


def transformers_path(name: str, settings: script.Settings) -> Callable | None:
    """transformers' EncodecModel of the same shape, with its own random weights."""
    try:
        from transformers import EncodecConfig, EncodecModel
    except ImportError:
        return None
    config = EncodecConfig() if name == "encodec_24khz" else EncodecConfig(
        target_bandwidths=[3.0, 6.0, 12.0, 24.0], sampling_rate=48_000, audio_channels=2,
        normalize=True, chunk_length_s=1.0, overlap=0.01, norm_type="time_group_norm",
        use_causal_conv=False,
    )  # fmt: skip
    model = EncodecModel(config).eval().to(settings.device)
    return lambda chunks: [model.encode(b, bandwidth=settings.bandwidth) for b in chunks.split(4)]


def measure_paths(name: str, weights: Path, device: str, rounds: int, count: int) -> None:
    """Print the time of a chunk of 2 s by each path, and the tokens that differ from plain ones."""
    settings = script.resolve_device(script.Settings(model=name, device=device))
    model = standin.plain_model(name, weights).to(settings.device)
    model.set_target_bandwidth(settings.bandwidth)
    audio = standin.varied_audio(model.sample_rate, model.channels, 2 * count, 7)
    flat = audio.transpose(0, 1).reshape(model.channels, -1)
    chunks = torch.stack(flat.split(2 * model.sample_rate, dim=1)).to(settings.device)
    encoder = script.make_encoder(script.load_model(settings, weights)[0], settings)

    def own(some: torch.Tensor) -> np.ndarray:
        return np.stack([codes for codes, _ in encoder.encode(list(some))])

    paths = {"this script": (own, count), "this script, 1 chunk in all": (own, 1)}
    paths["plain EnCodec, one chunk at a time"] = plain_path(model, 1), min(count, 4)
    paths["plain EnCodec, batches of 16"] = plain_path(model, 16), min(count, 16)
    other = transformers_path(name, settings)
    if other:
        paths["transformers, batches of 4"] = other, min(count, 4)
    timings: dict[str, list[float]] = {label: [] for label in paths}
    for number in tqdm(range(rounds + 1), desc=name):  # the first round warms up
        for label, (path, size) in paths.items():
            torch.set_num_threads(1 if path is own else script.THREADS)
            took = seconds(lambda: path(chunks[:size]), settings.device) / size  # noqa: B023
            timings[label] += [took] if number else []
    print(f"\n{name}, 6 kbps, a chunk of 2 s, medians of {rounds} rounds\n")
    print("| path | ms a chunk | times this script's |\n|---|---|---|")
    base = np.array(timings["this script"])
    for label, took in timings.items():
        print(f"| {label} | {np.median(took) * 1e3:.1f} | {np.median(np.array(took) / base):.2f} |")
    different = int((own(chunks) != plain_path(model, 1)(chunks)).sum())
    print(f"tokens that differ from plain EnCodec's: {different} of {own(chunks).size}")
    whole = script.replace(settings, whole=True, batch_size=None, device=device)
    encoder = script.make_encoder(encoder.model, script.resolve_device(whole))
    different = (next(encoder.encode([flat]))[0] != reference.codes(model, flat)).sum()
    print(f"tokens that differ, {2 * count} s as one whole clip: {different}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and clips")
    parser.add_argument("--smoke", action="store_true", help="one round with the fewest clips")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{args.device}, {capability}, {script.THREADS} threads, torch {torch.__version__}")
    rounds, few, many = (1, 1, 2) if args.smoke else (2, 4, 24) if args.quick else (5, 4, 64)
    names = ["encodec_24khz"] if args.smoke else list(script.MODELS)
    cases = [(name, count) for name in names for count in dict.fromkeys((1, few, many))]
    cases += [(name, min(many, 25), "--whole") for name in names]
    minutes = 0.2 if args.smoke else 2 if args.quick else 10
    with tempfile.TemporaryDirectory() as folder:
        sizes = (200, 8) if args.smoke else ()
        weights = {name: make_weights(name, Path(folder), sizes) for name in names}
        for name in names:
            measure_paths(name, weights[name], args.device, rounds, max(4, many // 2))
        measure_processes(weights, args.device, cases, rounds)
        measure_memory(weights, args.device, [(name, 1, 60.0 * minutes) for name in names])


if __name__ == "__main__":
    main()
