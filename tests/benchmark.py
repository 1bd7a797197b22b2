"""Measure the script on this machine, against the alternatives, in one run.

    python tests/benchmark.py                        both models, some 30 minutes on 2 cores
    python tests/benchmark.py --quick                some five minutes
    python tests/benchmark.py --device cuda
    python tests/benchmark.py --audio_dir FOLDER     your own files in place of made ones

Machines change their speed from one minute to the next. So every path runs in every round, and the
median of the rounds' ratios counts. Two are optional:  pip install transformers onnx onnxruntime
"""

import argparse
import csv
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
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


def seconds(function: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def chunk_gflop(model, chunk: torch.Tensor) -> float:
    """Multiplications and additions to encode one chunk [C, T], in 1e9."""
    flop = 0

    def count_convolution(module, _, output):
        nonlocal flop
        flop += 2 * output.numel() * module.in_channels * module.kernel_size[0]

    def count_lstm(module, inputs, _):
        nonlocal flop
        width = module.hidden_size
        flop += 2 * inputs[0].shape[0] * module.num_layers * 4 * width * 2 * width

    kinds = {torch.nn.Conv1d: count_convolution, torch.nn.LSTM: count_lstm}
    hooks = [
        module.register_forward_hook(kinds[type(module)])
        for module in model.encoder.modules()
        if type(module) in kinds
    ]
    codes = torch.cat([frame for frame, _ in model.encode(chunk[None])], dim=2)
    for hook in hooks:
        hook.remove()
    return (flop + 2 * codes.numel() * 128 * 1024) / 1e9


def best_convolution_rate() -> float:
    """GFLOP/s of the fastest of a few convolutions whose data and weights fit the cache."""
    best = 0.0
    shapes = (64, 56, 3), (128, 28, 3), (256, 28, 3), (256, 32, 1), (512, 14, 3)
    for channels, size, kernel in shapes:
        x = torch.randn(4, channels, size, size).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(channels, channels, kernel).to(memory_format=torch.channels_last)
        flop = 2 * conv(x).numel() * channels * kernel**2
        best = max(best, *(flop / seconds(lambda: conv(x), "cpu") / 1e9 for _ in range(30)))  # noqa: B023
    return best


# ----------------------------------------------------------------------------------- paths to codes


def ours(settings, weights: Path) -> Callable[[list], list[np.ndarray]]:
    """The script's own, through its threads: chunks [C, T] -> a clip [1, K, F] of each."""
    encoder = script.Encoder(script.load_model(settings, weights)[0], settings)

    def path(chunks: list) -> list[np.ndarray]:
        clips = [script.Clip(str(i), chunks=[chunk]) for i, chunk in enumerate(chunks)]
        torch.set_num_threads(1)  # as the script does
        encoded = list(script.encode_clips(clips, encoder))
        torch.set_num_threads(script.THREADS)
        return [clip.codes for clip in encoded]

    return path


def plain(model, batch_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def path(chunks: torch.Tensor) -> torch.Tensor:
        frames = [model.encode(batch) for batch in chunks.split(batch_size)]
        return torch.cat([torch.cat([codes for codes, _ in f], dim=2) for f in frames]).cpu()

    return path


def transformers_path(name: str, settings) -> Callable | str:
    """transformers' EncodecModel of the same shape, with its own random weights."""
    try:
        from transformers import EncodecConfig, EncodecModel
    except ImportError as error:
        return f"not measured ({error})"
    config = EncodecConfig() if name == "encodec_24khz" else EncodecConfig(
        target_bandwidths=[3.0, 6.0, 12.0, 24.0], sampling_rate=48_000, audio_channels=2,
        normalize=True, chunk_length_s=1.0, overlap=0.01, norm_type="time_group_norm",
        use_causal_conv=False,
    )  # fmt: skip
    model = EncodecModel(config).eval().to(settings.device)

    def path(chunks: torch.Tensor) -> None:
        for batch in chunks.split(4):
            model.encode(batch, bandwidth=settings.bandwidth)

    return path


def onnx_path(settings, weights: Path, folder: Path) -> Callable | str:
    """The same encoder and codebooks in ONNX Runtime, fp32, one chunk at a time."""
    try:
        import onnx  # noqa: F401, the exporter wants it
        import onnxruntime
    except ImportError as error:
        return f"not measured ({error})"
    if settings.model != "encodec_24khz":
        return "not measured (the export knows no segments)"
    model, _ = script.load_model(settings, weights)
    script.Encoder(model, settings)  # folds the weight norm, as an export wants it
    model.requires_grad_(False)
    rate, kbps = model.frame_rate, model.bandwidth
    num_codebooks = model.quantizer.get_num_quantizers_for_bandwidth(rate, kbps)

    class Encode(torch.nn.Module):
        def forward(self, x):
            residual, codes = model.encoder(x)[0].T, []
            for layer in model.quantizer.vq.layers[:num_codebooks]:
                book = layer.codebook
                squared = book.pow(2).sum(1)
                nearest = (2 * residual @ book.T - squared).argmax(1)
                residual = residual - book[nearest]
                codes.append(nearest)
            return torch.stack(codes)[None]

    file = folder / "encoder.onnx"
    example = torch.zeros(1, model.channels, settings.chunk_samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Encode(), (example,), str(file), dynamo=False, input_names=["x"])
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def path(chunks: torch.Tensor) -> torch.Tensor:
        codes = [session.run(None, {"x": chunk[None].numpy()})[0] for chunk in chunks]
        return torch.from_numpy(np.concatenate(codes))

    return path


# ------------------------------------------------------------------------------------ what is shown


def measure_encoding(name: str, weights: Path, device: str, rounds: int, num_chunks: int) -> None:
    flags = ["--model", name, "--device", device]
    settings = script.resolve_device(script.parse_settings(flags))
    device = settings.device
    model = standin.plain_model(name, weights).to(device)
    model.set_target_bandwidth(settings.bandwidth)
    audio = standin.varied_audio(model.sample_rate, model.channels, 2 * num_chunks, 7)
    flat = audio.transpose(0, 1).reshape(model.channels, -1)
    chunks = torch.stack(flat.split(settings.chunk_samples, dim=1)).to(device)
    gflop = chunk_gflop(model, chunks[0])
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            "this script": (own := ours(settings, weights), num_chunks),
            "this script, 4 chunks in all": (own, 4),
            "this script, 1 chunk in all": (own, 1),
            "plain EnCodec, one chunk at a time": (plain(model, 1), 4 if device == "cpu" else 32),
            "plain EnCodec, batches of 16": (plain(model, 16), 16),
            "transformers, batches of 4": (transformers_path(name, settings), 4),
        }
        if device == "cpu":
            onnx = onnx_path(settings, weights, Path(folder))
            paths["ONNX Runtime, one chunk at a time"] = (onnx, 4)
        timings: dict[str, list[float]] = {label: [] for label in paths}
        for i in tqdm(range(rounds + 1), desc=name):
            for label, (path, count) in paths.items():
                if callable(path):
                    torch.set_num_threads(script.THREADS)
                    took = seconds(lambda: path(chunks[:count]), device) / count  # noqa: B023
                    timings[label] += [took] if i else []  # the first round warms up
        torch.set_num_threads(script.THREADS)
        first, again = (
            torch.from_numpy(np.concatenate(path(chunks)))
            for path in (own, ours(settings, weights))
        )
        expected = plain(model, 1)(chunks)
    print(f"\n{name}, {settings.bandwidth:g} kbps, chunks of 2 s, median of {rounds} rounds")
    print("| path | ms a chunk | s of audio/s | times this script's time |\n|---|---|---|---|")
    base = np.array(timings["this script"])
    for label, took in timings.items():
        if took:
            median, ratio = np.median(took), np.median(np.array(took) / base)
            print(f"| {label} | {median * 1e3:.1f} | {2 / median:.0f} | {ratio:.2f} |")
        else:
            print(f"| {label} | {paths[label][0]} | | |")
    different = int((first != expected).sum())
    print(f"tokens that differ from plain EnCodec: {different} of {first.numel()}")
    print(f"tokens that differ between two runs: {int((first != again).sum())}")
    rate = gflop / np.median(base)
    print(f"{gflop:.1f} GFLOP a chunk: {rate:.0f} GFLOP/s")
    if device == "cpu":
        peak = best_convolution_rate()
        print(f"{rate / peak:.0%} of the best of a few convolutions ({peak:.0f} GFLOP/s)")


def curated_lengths(rng: np.random.Generator, count: int) -> list[float]:
    """Seconds of clips, distributed as train_curated's."""
    return np.clip(rng.lognormal(1.6, 0.95, count), 0.3, 30).tolist()


def write_clips(folder: Path, num_clips: int, length_s: float | None = None) -> None:
    """Clips as long as train_curated's, or all of `length_s`, in Kaggle's layout."""
    rng = np.random.default_rng(1)
    audio = standin.varied_audio(44_100, 1, 60, 3).reshape(-1).numpy()
    (folder / "train_curated").mkdir(parents=True)
    rows = [("fname", "labels")]
    for i, duration_s in enumerate(curated_lengths(rng, num_clips)):
        start = rng.integers(0, len(audio) // 2)
        length = round(44_100 * (length_s or duration_s))
        samples = np.clip(np.resize(np.roll(audio, -start), length), -1, 1)  # repeated if short
        soundfile.write(folder / "train_curated" / f"{i:05d}.wav", samples, 44_100)
        rows.append((f"{i:05d}.wav", "Label"))
    with (folder / "train_curated.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def measure_end_to_end(flags: list, weights: Path, device: str, rounds: int) -> None:
    """Measure the whole pipeline, and the same without its encoder."""
    argv = [*map(str, flags), "--device", device]
    settings = script.resolve_device(script.parse_settings(argv))
    encoder = script.Encoder(script.load_model(settings, weights)[0], settings)

    class ReadyMade:
        """Gives codes at once, so that only the work of the main thread and the readers is left."""

        model, settings, wants_latents = encoder.model, encoder.settings, False

        def segments(self, chunk):
            return [chunk]

        def convolve(self, segment):
            return None, 0.0

        def codes(self, convolved):
            return np.zeros((len(convolved), 8, 150), dtype=np.int64), None, 0.0

    def pipeline(encoder) -> tuple[float, float, script.Dataset]:
        """Seconds from start to end, those of the main thread, and the clips."""
        (dataset,) = script.find_datasets(settings)
        with tempfile.TemporaryDirectory() as out:
            job = script.Job(replace(settings, output_dir=Path(out)), dataset, "benchmark")
            missing = job.missing_blocks()
            own = time.thread_time()
            took = seconds(lambda: script.make_blocks(job, missing, encoder), device)
            return took, time.thread_time() - own, dataset

    torch.set_num_threads(1)  # as the script does
    with redirect_stderr(io.StringIO()):
        runs = [(pipeline(encoder), pipeline(ReadyMade())) for _ in range(rounds)]
    torch.set_num_threads(script.THREADS)
    clips = runs[0][0][2].clips
    audio_s, chunks = sum(c.duration_s for c in clips), sum(c.num_chunks for c in clips)
    whole = np.median([took for (took, _, _), _ in runs])
    fed = np.median([took for _, (took, _, _) in runs])
    main = np.median([own for _, (_, own, _) in runs]) / chunks * 1e3
    print(f"\nend to end: {len(clips)} clips, {audio_s:.0f} s of audio, {chunks} chunks")
    print(f"{whole:.1f} s, {audio_s / whole:.0f} s of audio/s (median of {rounds} rounds)")
    print(f"without the encoder: {audio_s / fed:.0f} s of audio/s;", end=" ")
    print(f"main thread {main:.3f} ms a chunk")


def measure_trials(folder: Path, name: str, weights: Path, rounds: int, counts: list[int]) -> None:
    """Whole processes, imports and model included, beside a plain loop's (plain_loop.py)."""
    print(f"\n{name}: whole processes, median of {rounds} rounds")
    print(
        "| clips | this script, s | plain loop, s | times this script's time |\n|---|---|---|---|"
    )
    for count in counts:
        times = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as out:
                flags = ["--input_dir", folder, "--model", name, "--max_samples", count]
                flags += ["--output_dir", out, "--weights", weights]
                ours = [ROOT / "encodec_tokenizer.py", *flags]
                theirs = [ROOT / "tests" / "plain_loop.py", folder, name, weights, count]
                commands = [ours, [*theirs, Path(out, "plain.csv")]]
                times.append([seconds(lambda: run_python(c), "cpu") for c in commands])  # noqa: B023
        own, plain = np.median(times, axis=0)
        ratio = np.median([b / a for a, b in times])
        print(f"| {count} | {own:.1f} | {plain:.1f} | {ratio:.2f} |", flush=True)


def run_python(command: list) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)


def measure_whole(name: str, weights: Path, device: str, rounds: int, count: int) -> None:
    """Measure --whole beside chunks of 2 s and plain EnCodec on whole clips."""
    flags = ["--model", name, "--device", device]
    chunked = script.resolve_device(script.parse_settings(flags))
    whole = script.resolve_device(script.parse_settings([*flags, "--whole"]))
    model = standin.plain_model(name, weights).to(chunked.device)
    model.set_target_bandwidth(whole.bandwidth)
    audio = standin.varied_audio(model.sample_rate, model.channels, 30, 7)
    audio = audio.transpose(0, 1).reshape(model.channels, -1).to(chunked.device)
    lengths_s = curated_lengths(np.random.default_rng(1), count)
    clips = [audio[:, : round(length * model.sample_rate)] for length in lengths_s]
    chunks = [chunk for clip in clips for chunk in script.split_chunks(clip, chunked)[1]]

    def plain_loop(clips: list) -> list[np.ndarray]:
        return [reference.codes(model, clip)[None] for clip in clips]

    audio_s, chunks_s = sum(lengths_s), len(chunks) * chunked.target_duration
    paths = {
        "--whole": (own := ours(whole, weights), clips, audio_s),
        "chunks of 2 s, overlaps and padding counted": (ours(chunked, weights), chunks, chunks_s),
        "plain EnCodec on whole clips": (plain_loop, clips, audio_s),
    }
    rates = {label: np.empty(rounds) for label in paths}
    for i in range(-1, rounds):  # the first round, at place -1, warms up
        for label, (path, pieces, encoded_s) in paths.items():
            took = seconds(lambda: path(pieces), device)  # noqa: B023
            rates[label][i] = encoded_s / took
    print(f"\n{name}: {count} whole clips, {audio_s:.0f} s, median of {rounds} rounds")
    print("| path | s of audio/s | --whole is faster by |\n|---|---|---|")
    for label, rate in rates.items():
        print(f"| {label} | {np.median(rate):.1f} | {np.median(rates['--whole'] / rate):.2f} |")
    equal = [(a == b).ravel() for a, b in zip(own(clips), plain_loop(clips))]
    print(f"tokens that equal plain EnCodec's: {np.concatenate(equal).mean():.4%}")


def peak_gb(command: list) -> float:
    """Peak memory of a process that a small one starts: a child's counts from its parent's."""
    small = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", small, sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1e6


def measure_memory(weights: Path, device: str, cases: list[tuple]) -> None:
    """Peak memory of whole runs at 24 kHz; with --whole, beside the plain loop's."""
    print("\npeak memory of a run, 24 kHz:")
    for count, length_s, *flags in cases:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_clips(root / "input", count, length_s)
            args = ["--input_dir", root / "input", "--output_dir", root / "out", "--device", device]
            ours = [ROOT / "encodec_tokenizer.py", *args, "--weights", weights, *flags]
            line = f"{peak_gb(ours):.2f} GB for {count} clips of {length_s:g} s, {' '.join(flags)}"
            if "--whole" in flags:
                plain = [root / "input", "encodec_24khz", weights, count, root / "csv", "whole"]
                line += f"; plain {peak_gb([ROOT / 'tests' / 'plain_loop.py', *plain]):.2f} GB"
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and clips")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--audio_dir", type=Path, help="your files for the end-to-end part")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"{script.machine(args.device)}, {script.THREADS} threads, torch {torch.__version__}")
    rounds = 3 if args.quick else 15
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = {}
        for name in script.MODELS:
            weights[name] = root / f"{name}.th"
            torch.save(standin.stand_in(name, num_codebooks=8), weights[name])  # of 6 kbps
            num_chunks = 64 if args.device == "cpu" else 512
            measure_encoding(name, weights[name], args.device, rounds, num_chunks)
        write_clips(root / "input", 12 if args.quick else 100)
        if args.device == "cpu":
            for name, path in weights.items():
                few = [1, 4] if args.quick else [1, 4, 16, 64]
                measure_trials(root / "input", name, path, 1 if args.quick else 5, few)
        own = args.audio_dir
        flags = ["--audio_dir", own] if own else ["--input_dir", root / "input"]
        measure_end_to_end(flags, weights["encodec_24khz"], args.device, 2 if args.quick else 5)
        for name, path in weights.items():
            measure_whole(name, path, args.device, rounds, 8 if args.quick else 40)
        cases = [(50, 2.0), (1, 60.0, "--whole")]
        if not args.quick:
            cases = [(200, 2.0), (2000, 2.0), (40, 30.0, "--target_duration", "30")]
            cases += [(1, seconds, "--whole") for seconds in (10.0, 60.0, 600.0)]
        measure_memory(weights["encodec_24khz"], args.device, cases)


if __name__ == "__main__":
    main()
