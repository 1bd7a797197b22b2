import subprocess
import sys

import pytest
from conftest import ROOT

from encodec_tokenizer import parse_settings

SCRIPT = str(ROOT / "encodec_tokenizer.py")


def test_defaults_are_those_of_the_contract():
    settings = parse_settings([])
    assert (settings.dataset, settings.model, settings.bandwidth) == ("curated", "encodec_24khz", 6)
    assert (settings.target_duration, settings.overlap) == (2.0, 0.1)
    assert (settings.aggregate, settings.weights) == ("mean", "pretrained")
    assert (str(settings.input_dir), str(settings.output_dir)) == ("input", "work/tokenized")
    assert settings.max_samples is None and not settings.overwrite and not settings.debug


@pytest.mark.parametrize("target, overlap, hop", [(2.0, 0.1, 43_200), (3.0, 0.5, 36_000)])
def test_chunk_and_hop_are_rounded_to_samples(target, overlap, hop):
    settings = parse_settings(["--target_duration", str(target), "--overlap", str(overlap)])
    assert (settings.chunk_samples, settings.hop_samples) == (round(target * 24_000), hop)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--bandwidth", "7"], "encodec_24khz offers 1.5, 3, 6, 12, 24 kbps"),
        (["--bandwidth", "1.5", "--model", "encodec_48khz"], "encodec_48khz offers 3, 6, 12, 24"),
        (["--target_duration", "0"], "0 is out of range: from 0.1 to 60"),
        (["--target_duration", "nan"], "nan is out of range"),
        (["--target_duration", "two"], "invalid float value: 'two'"),
        (["--overlap", "1.0"], "1.0 is out of range: from 0 to 0.9"),
        (["--overlap", "-0.1"], "-0.1 is out of range"),
        (["--max_samples", "0"], "0 is out of range"),
        (["--batch_size", "-4"], "-4 is out of range"),
        (["--workers", "0"], "0 is out of range"),
        (["--dataset", "other"], "invalid choice: 'other'"),
        (["--aggregate", "median"], "invalid choice: 'median'"),
        (["--device", "tpu"], "choose from auto, cpu, cuda, cuda:N"),
        (["--device", "cuda:99"], "PyTorch sees"),
        (["--input-dir", "x"], "unrecognized arguments: --input-dir"),
    ],
)
def test_what_cannot_be_meant_ends_in_one_sentence_and_status_2(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(args)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_help_shows_every_flag_its_default_and_examples(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in parse_settings([]).__dataclass_fields__:
        assert f"--{flag}" in text
    for default in ("curated", "work/tokenized", "encodec_24khz", "6.0", "2.0", "0.1", "mean"):
        assert f"(default: {default})" in text
    assert "python encodec_tokenizer.py --dataset sample" in text


def test_torchaudio_of_another_torch_is_explained(tmp_path):
    (tmp_path / "torchaudio.py").write_text("raise RuntimeError('PyTorch has CUDA version 13.2')")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"},
    )
    assert done.returncode == 1
    assert "PyTorch has CUDA version 13.2" in done.stderr
    assert "'torch': '2." in done.stderr and "'torchaudio': '2." in done.stderr
    assert 'pip install "torch>=2.6,<2.12" "torchaudio>=2.6,<2.12"' in done.stderr
    assert "Traceback" not in done.stderr
