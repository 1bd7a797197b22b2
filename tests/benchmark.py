"""Measure whole processes of the script beside a plain loop over Meta's model, in one run.

    python tests/benchmark.py                 both models; on 2 cores many minutes
    python tests/benchmark.py --quick         fewer rounds and clips
    python tests/benchmark.py --device cuda
    python tests/benchmark.py --smoke         to see it run

Prints time, CPU time, peak memory, and how many tokens differ. The weights are stand-ins for the
trained ones, and the clips are as long as curated's. Machines change their speed from one minute to
the next. So both run in every round, and the median of the rounds' ratios counts.
"""

import argparse
import csv
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import standin
import torch
from tqdm import tqdm

TESTS = Path(__file__).resolve().parent
CODEBOOKS = {"encodec_24khz": 8, "encodec_48khz": 4}  # at 6 kbps
HEAD = """\
| model, clips | this script | plain loop | ratio | of CPU | peak memory | plain | tokens differ |
|---|---|---|---|---|---|---|---|"""
MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
wall, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
print(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9)
"""


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


def measure(program: Path, *args: object) -> list[float]:
    """Run a program. Returns its wall time and CPU time in seconds, and its peak memory in GB.

    A small process starts it, for a program inherits the peak memory of the process that starts it.
    """
    command = [sys.executable, "-c", MEASURE, sys.executable, program, *args]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program.name} failed:\n{done.stderr}")
    return [float(number) for number in done.stdout.split()]


def read_tokens(path: Path, whole: bool) -> np.ndarray:
    """The tokens of all rows of the script's CSV, one after the other."""
    table = pd.read_csv(path)
    if whole:
        return np.array(" ".join(table["tokens"]).split(), dtype=int)
    return table.filter(regex=r"^token_\d+$").to_numpy().ravel()


def read_plain_tokens(path: Path) -> np.ndarray:
    """The same of the plain loop's, which has no header: two cells come before the tokens."""
    with path.open(newline="") as file:
        return np.concatenate([np.array(cells[2:], dtype=int) for cells in csv.reader(file)])


def compare(
    name: str, weights: Path, device: str, lengths_s: list, flags: list, rounds: int
) -> str:
    """Run the script and the plain loop in turn; returns their line of the table."""
    ours, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        clips, out = write_clips(Path(folder) / "input", lengths_s), Path(folder) / "out"
        args = ["--input_dir", clips, "--model", name, "--weights", weights, "--device", device]
        loop = [clips, name, weights, device, out / "plain.csv", *flags]
        for number in range(rounds):
            own = [*args, *flags, "--output_dir", out / str(number)]
            ours.append(measure(TESTS.parent / "encodec_tokenizer.py", *own))
            plain.append(measure(TESTS / "plain_loop.py", *loop))
        tokens = read_tokens(out / "0" / "tokenized_train_curated.csv", bool(flags))
        plain_tokens = read_plain_tokens(out / "plain.csv")
    if len(tokens) != len(plain_tokens):
        sys.exit(f"the script gives {len(tokens)} tokens, the plain loop {len(plain_tokens)}")
    ours, plain = np.array(ours), np.array(plain)
    what = f"{name}, clips: {len(lengths_s)}, {sum(lengths_s):.0f} s {' '.join(flags)}"
    (wall, _, gb), (plain_wall, _, plain_gb) = np.median(ours, 0), np.median(plain, 0)
    cells = [what, f"{wall:.1f} s", f"{plain_wall:.1f} s"]
    cells += [f"{ratio:.2f}" for ratio in np.median(plain / ours, 0)[:2]]
    different = (tokens != plain_tokens).sum()
    cells += [f"{gb:.2f} GB", f"{plain_gb:.2f} GB", f"{different:,} of {tokens.size:,}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and clips")
    parser.add_argument("--smoke", action="store_true", help="one round with the fewest clips")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    rounds, many, long_s = 5, 64, 300  # the last: seconds of one whole clip
    if args.quick:
        rounds, many, long_s = 2, 24, 120
    if args.smoke:
        rounds, many, long_s = 1, 2, 12
    names = ["encodec_24khz"] if args.smoke else list(CODEBOOKS)
    cases = []
    for name in names:
        cases += [(name, curated_lengths(count), []) for count in (1, 4, many) if count <= many]
        cases += [(name, curated_lengths(many), ["--whole"]), (name, [long_s], ["--whole"])]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{args.device}; {platform.machine()}, {capability}; torch {torch.__version__}")
    print(f"medians of {rounds} interleaved rounds of whole processes, imports included\n")
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: Path(folder) / f"{name}.th" for name in names}
        for name, path in weights.items():
            sizes = (200, 8) if args.smoke else ()
            torch.save(standin.stand_in(name, CODEBOOKS[name], *sizes), path)
        for name, lengths_s, flags in tqdm(cases):
            line = compare(name, weights[name], args.device, lengths_s, flags, rounds)
            tqdm.write(line)


if __name__ == "__main__":
    main()
