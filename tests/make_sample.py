"""Synthesize the clips of tests/sample: python tests/make_sample.py [FOLDER]

Short sounds of known shape, chosen to meet every branch of the pipeline: shorter than, equal to
and longer than two seconds, stereo, silence, and sample rates other than Freesound's 44.1 kHz.
"""

import csv
import sys
import wave
from pathlib import Path

import numpy as np


def seconds(duration: float, rate: int) -> np.ndarray:
    return np.arange(round(duration * rate)) / rate


def tone(t: np.ndarray, hz: float, partials: int = 1) -> np.ndarray:
    return sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, partials + 1))


def chirp(t: np.ndarray, start_hz: float, end_hz: float) -> np.ndarray:
    return np.sin(2 * np.pi * (start_hz * t + (end_hz - start_hz) * t**2 / (2 * t[-1])))


def clips() -> list[tuple[str, str, int, np.ndarray]]:
    """(name, labels, rate in Hz, samples [T] or [T, 2] within -1 and 1) of every clip."""
    rng = np.random.default_rng(2019)

    def noise(t: np.ndarray) -> np.ndarray:
        return rng.uniform(-1, 1, len(t))

    made = []

    def add(name: str, labels: str, duration: float, rate: int, sound) -> None:
        t = seconds(duration, rate)
        made.append((name, labels, rate, np.asarray(sound(t))))

    add("click.wav", "Click", 0.3, 44_100, lambda t: noise(t) * np.exp(-90 * t))
    add("beep.wav", "Tone", 0.5, 44_100, lambda t: 0.6 * tone(t, 880))
    add("bell.wav", "Bell,Tone", 0.9, 44_100, lambda t: 0.4 * tone(t, 523, 5) * np.exp(-4 * t))
    add("silence.wav", "Silence", 1.0, 16_000, lambda t: 0 * t)
    add("hiss.wav", "Noise", 1.2, 44_100, lambda t: 0.2 * noise(t))
    add("siren_48k.wav", "Siren", 1.4, 48_000, lambda t: 0.5 * chirp(t, 400, 1600))
    pan = lambda t: np.stack([0.5 * tone(t, 220, 3) * (1 - t), 0.4 * tone(t, 331, 3) * t], axis=1)  # noqa: E731
    add("stereo.wav", "Tone,Sweep", 1.0, 44_100, pan)
    add("two_seconds.wav", "Sweep", 2.0, 44_100, lambda t: 0.6 * chirp(t, 100, 6000))
    add("steps.wav", "Click,Noise", 2.5, 44_100, lambda t: noise(t) * np.exp(-25 * (t % 0.5)))
    add("string_22k.wav", "String", 3.0, 22_050, lambda t: 0.3 * tone(t, 147, 9) * np.exp(-t))
    beat = lambda t: 0.5 * tone(t, 110, 4) * (np.sin(2 * np.pi * 2 * t) > 0) + 0.05 * noise(t)  # noqa: E731
    add("rhythm_6s.wav", "Tone,Click", 6.0, 16_000, beat)
    add("whistle.wav", "Whistle", 1.9, 16_000, lambda t: 0.5 * tone(t + 0.002 * tone(t, 6), 1500))
    return made


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("fname", "labels")]
    for name, labels, rate, samples in clips():
        with wave.open(str(folder / name), "wb") as file:
            file.setnchannels(samples.ndim)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())
        rows.append((name, labels))
    with (folder / "sample.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "sample")
