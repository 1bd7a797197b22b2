"""The command line: defaults, mistakes, help, and what happens before PyTorch is there."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

import encodec_tokenizer
from encodec_tokenizer import Settings, UserError, parse_settings, resolve_device

SCRIPT = str(ROOT / "encodec_tokenizer.py")
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def start_beside(folder, *args, **environment) -> subprocess.Popen:
    """Start the script with the modules of a folder before all others."""
    env = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"], **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, SCRIPT, *args], env=env, text=True, **pipes)


def run_beside(folder, *args, **environment) -> subprocess.CompletedProcess:
    process = start_beside(folder, *args, **environment)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def test_defaults_are_those_of_the_contract():
    settings = parse_settings([])
    assert settings == Settings()
    assert (settings.dataset, settings.model, settings.bandwidth) == ("curated", "encodec_24khz", 6)
    assert (settings.target_duration, settings.overlap, settings.whole) == (2.0, 0.1, False)
    assert (settings.aggregate, settings.weights, settings.device) == ("mean", "pretrained", "auto")
    assert (str(settings.input_dir), str(settings.output_dir)) == ("input", "work/tokenized")
    assert (settings.max_duration, settings.max_samples, settings.overwrite) == (600, None, False)
    assert (settings.plot, settings.parquet, settings.debug) == (None, False, False)


def test_hyphens_are_understood_as_underscores():
    settings = parse_settings(["--max-samples=3", "--output-dir", "a-b", "--weights=c-d"])
    assert (settings.max_samples, str(settings.output_dir)) == (3, "a-b")
    assert settings.weights == "c-d"


MISTAKES = [
    (["--bandwidth", "7"], "encodec_24khz offers 1.5, 3, 6, 12, 24 kbps"),
    (["--bandwidth", "1.5", "--model", "encodec_48khz"], "encodec_48khz offers 3, 6, 12, 24"),
    (["--target_duration", "0"], "0.0 is out of range (0.1 to 60)"),
    (["--target_duration", "nan"], "nan is out of range"),
    (["--target_duration", "two"], "invalid float value: 'two'"),
    (["--overlap", "1.0"], "1.0 is out of range (0 to 0.9)"),
    (["--overlap", "-0.1"], "-0.1 is out of range"),
    (["--max_samples", "0"], "0 is out of range"),
    (["--batch_size", "-4"], "-4 is out of range"),
    (["--workers", "0"], "0 is out of range"),
    (["--max_samples", "2.5"], "invalid int value: '2.5'"),
    (["--dataset", "other"], "--dataset other: choose from curated, noisy, both, test, sample"),
    (["--aggregate", "mediod"], "none; did you mean medoid?"),
    (["--device", "tpu"], "--device tpu: choose from auto, cpu, cuda, cuda:N"),
    (["--max_sample", "3"], "unrecognized arguments: --max_sample 3; did you mean --max_samples?"),
    (["--bandwith=3"], "did you mean --bandwidth?"),
    (["--audio_dir", ""], "--audio_dir is empty: is a shell variable unset?"),
    (["--weights="], "--weights is empty"),
    (["--output_dir="], "--output_dir is empty"),
    (["--audio_dir", "x", "--label_column", "y"], "--label_column names a column of a table"),
    (["extra"], "unrecognized arguments: extra"),
    (["--whole", "--aggregate", "none"], "--aggregate is not allowed with --whole"),
    (["--overlap", "0.2", "--whole"], "--overlap is not allowed with --whole"),
    (["--plot", "picture.gif"], "must end in .png, .pdf or .svg"),
    (["--dataset", "test", "--audio_dir", "x"], "each name a set of clips: give one of them"),
    (["--metadata", "clips.csv"], "--metadata needs --audio_dir"),
]


@pytest.mark.parametrize("args, says", MISTAKES)
def test_a_mistake_ends_in_one_sentence_and_status_2(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert says in err and "usage" not in err
    assert out == "" and err.count("\n") == 2


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    """The shell expands it in `--weights ~/x`, and not in `--weights=~/x`."""
    monkeypatch.setenv("HOME", "/home/me")
    names = ("metadata", "audio_dir", "input_dir", "output_dir", "weights", "plot")
    settings = parse_settings([f"--{name}=~/{name}.png" for name in names])
    assert [str(getattr(settings, name)) for name in names] == [f"/home/me/{n}.png" for n in names]


@pytest.mark.parametrize("flag, package", [("--plot", "matplotlib"), ("--parquet", "pyarrow")])
def test_a_flag_without_its_package_says_what_to_install(flag, package, monkeypatch, capsys):
    monkeypatch.setattr(encodec_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        parse_settings([flag])
    assert stop.value.code == 2 and f"pip install {package}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.device_count() > 99, reason="there is such a GPU")
def test_a_gpu_that_is_not_there_ends_in_one_sentence_and_status_2(run):
    status, _, err = run("--dataset", "sample", device="cuda:99")
    assert status == 2
    assert err.startswith("error: --device cuda:99 cannot be used: ") and err.count("\n") == 1


def test_auto_takes_the_cpu_where_pytorch_has_no_kernels_for_the_gpu(monkeypatch, capfd):
    """PyTorch sees Kaggle's P100 and fails at the first convolution; here any convolution fails."""

    def no_kernel(*_):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(encodec_tokenizer.F, "conv1d", no_kernel)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))
    settings = resolve_device(parse_settings([]))
    assert settings.device == "cpu" and settings.batch_size == 4
    err = capfd.readouterr().err
    assert "no kernel image is available" in err and "Compile" not in err
    with pytest.raises(UserError, match=r"--device cuda cannot be used: .*no kernel image"):
        resolve_device(parse_settings(["--device", "cuda"]))


@pytest.mark.parametrize(
    "flags, size",
    [
        ("--target_duration 60", 4),
        ("--batch_size 7", 7),
        ("--whole", 1),  # clips differ in length
        ("--whole --model encodec_48khz", 4),  # of the model's segments of 1 s
    ],
)
def test_a_batch_is_four_segments_or_one_whole_clip(flags, size):
    settings = parse_settings(["--device", "cpu", *flags.split()])
    assert resolve_device(settings).batch_size == size


@pytest.mark.parametrize("cores, workers", [(1, 2), (16, 2), (64, 8)])
def test_more_groups_are_at_work_on_many_cores(cores, workers, monkeypatch):
    monkeypatch.setattr(encodec_tokenizer, "THREADS", cores)
    assert resolve_device(parse_settings(["--device", "cpu"])).workers == workers


def test_help_shows_every_flag_with_its_default_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in fields(Settings):
        assert f"--{setting.name} " in text
        if setting.default not in (None, False):
            assert f"(default: {setting.default})" in text
    assert "python encodec_tokenizer.py --dataset sample" in text


# ----------------------------------------------------------------------- before PyTorch is there


@pytest.mark.parametrize(
    "package, error, says",
    [
        ("torch", "ImportError('No module named x')", "No module named x"),
        # As torchaudio fails beside another version of torch.
        ("torchaudio", "OSError('Could not load') from OSError('no symbol x')", "no symbol x"),
    ],
)
def test_a_package_that_does_not_load_is_explained(package, error, says, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise {error}")
    done = run_beside(tmp_path, "--dataset", "sample")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert says in done.stderr and "pip install -r requirements.txt" in done.stderr


@pytest.mark.parametrize("args", [["--help"], ["--version"], MISTAKES[0][0], MISTAKES[-1][0]])
def test_help_and_mistakes_are_answered_before_torch_is_imported(args, tmp_path):
    """Which takes seconds."""
    (tmp_path / "torch.py").write_text("import os; os._exit(99)")
    done = run_beside(tmp_path, *args)
    assert done.returncode == (2 if len(args) > 1 else 0), done.stderr
    assert bool(done.stdout) != bool(done.stderr)


def test_ctrl_c_while_python_imports_ends_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    process = start_beside(tmp_path, "--dataset", "sample")
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and err == ""


@pytest.mark.parametrize("given, expected", [({}, ":16:8"), ({CUBLAS: ":4096:8"}, ":4096:8")])
def test_cublas_is_deterministic_unless_the_user_has_a_say(given, expected, monkeypatch):
    """PyTorch's page on torch.nn.LSTM asks for it. It has to be there before CUDA starts."""
    for name in (CUBLAS, "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT"):
        monkeypatch.setenv(name, "")  # for its value to be restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError):
        resolve_device(parse_settings(["--device", "cuda:99"]))
    assert os.environ[CUBLAS] == expected


@pytest.mark.parametrize("rank, size", [("2", "2"), ("x", "2"), ("0", "zero"), ("-1", "2")])
def test_a_rank_outside_the_world_is_refused(rank, size, tmp_path):
    """Nobody would write the CSV of a Slurm array that counts from 1."""
    done = run_beside(tmp_path, "--dataset", "sample", RANK=rank, WORLD_SIZE=size)
    assert done.returncode == 2 and done.stderr.count("\n") == 2
    assert re.search(f"RANK={rank} and WORLD_SIZE={size}: RANK counts from 0", done.stderr)
