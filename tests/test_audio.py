import errno
import io
import os
import random
import re
import struct
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import reference
import soundfile
import torch

from encodec_tokenizer import (
    BadClip,
    Clip,
    clip_path,
    load_clip,
    parse_settings,
    read_audio,
    resampler,
    resolve_device,
)


def model_audio(path, rate, channels):
    samples, file_rate = read_audio(path, channels, 600)
    return resampler(file_rate, rate, "cpu")(samples)


@pytest.mark.parametrize("model_rate, model_channels", [(24_000, 1), (48_000, 2)])
@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_and_one_to_eight_channels(
    rate, channels, model_rate, model_channels, tmp_path, sound
):
    path = tmp_path / "a.wav"
    soundfile.write(path, sound(0.25, rate, channels), rate, subtype="FLOAT")
    ours, theirs = (
        model_audio(path, model_rate, model_channels),
        reference.load(path, model_rate, model_channels),
    )
    assert ours.shape == theirs.shape
    assert ours.shape[0] == model_channels
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_other_formats_are_read(name, tmp_path, sound):
    soundfile.write(tmp_path / name, sound(0.5), 44_100)
    samples, rate = read_audio(tmp_path / name, 1, 600)
    theirs, _ = soundfile.read(tmp_path / name, dtype="float32")
    assert rate == 44_100
    assert np.array_equal(samples[0], theirs) and len(theirs) == 22_050


def test_a_long_file_is_read_whole_in_pieces(tmp_path):
    samples = np.linspace(-1, 1, 2**21 + 17)[:, None].repeat(2, axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    ours, _ = read_audio(tmp_path / "a.wav", 2, 600)
    assert np.array_equal(ours.numpy().T, samples.astype(np.float32))


@pytest.mark.parametrize("rate", [11_127, 44_056, 44_101, 47_999, 23_999])
def test_an_odd_rate_takes_little_memory_and_keeps_the_pitch(rate):
    kernel = getattr(resampler(rate, 24_000, "cpu"), "kernel", torch.empty(0))  # none for 1:1
    assert kernel.numel() < 2**23
    t = torch.arange(rate) / rate
    out = resampler(rate, 24_000, "cpu")(torch.sin(2 * torch.pi * 440 * t)[None])
    assert out.shape[1] == pytest.approx(24_000, rel=2.5e-4)
    crossings = (out[0, 1:] * out[0, :-1] < 0).sum().item()
    assert crossings == pytest.approx(880, abs=2)


def write_bad_clips(folder, sound):
    """name -> what its reason must say"""
    good = folder / "good.wav"
    soundfile.write(good, sound(1.0), 44_100)
    whole = good.read_bytes()
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "no_samples.wav", np.zeros(0), 44_100)
    (folder / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "whole.flac", sound(1.0), 44_100)
    (folder / "truncated.flac").write_bytes((folder / "whole.flac").read_bytes()[:9000])
    (folder / "text.wav").write_text("This is not audio." * 99)
    (folder / "page.mp3").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "zeros.wav").write_bytes(bytes(5_000))
    (folder / "random.wav").write_bytes(bytes(range(256)) * 9)
    (folder / "x.raw").write_bytes(whole)
    (folder / "headless.au").write_bytes(whole[50:])
    for name, value in {"nan": np.nan, "infinite": np.inf, "absurd": 3e38}.items():
        samples = sound(1.0).astype(np.float32)
        samples[500] = value
        soundfile.write(folder / f"{name}.wav", samples, 44_100, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    data = bytearray(whole)
    data[24:28] = struct.pack("<I", 2**31 - 1)
    (folder / "rate.wav").write_bytes(data)
    return {
        "missing.wav": "no such file in audio/",
        "empty.wav": "empty file (0 bytes)",
        "no_samples.wav": "no samples",
        "truncated.wav": "truncated: 44078 of 88200 bytes",
        "truncated.flac": "damaged, or of a kind that libsndfile cannot decode (Error :",
        "headless.au": "raw samples: there is no header",
        "text.wav": "not audio: it holds text",
        "page.mp3": "not audio: it holds text",
        "zeros.wav": "not audio that can be read (soundfile:",
        "random.wav": "not audio that can be read (soundfile:",
        "x.raw": "raw samples: there is no header",
        "nan.wav": "NaN, infinite or absurdly large",
        "infinite.wav": "NaN, infinite or absurdly large",
        "absurd.wav": "NaN, infinite or absurdly large",
        "folder.wav": "not a plain file",
        "pipe.wav": "not a plain file",
        "rate.wav": "2147483647 Hz is not plausible",
        "": "the name is empty",
        "../good.wav": "leads outside the audio folder; not opened",
        "a/../../good.wav": "leads outside the audio folder; not opened",
        "/etc/hostname": "leads outside the audio folder; not opened",
        "C:\\clip.wav": "leads outside the audio folder; not opened",
        "..\\good.wav": "leads outside the audio folder; not opened",
        "nul\0.wav": "NUL character",
        "long" * 100 + ".wav": "cannot be opened: File name too long",
    }


def loaded(folder, name, *flags):
    """The clip of that name, as a run loads it."""
    settings = resolve_device(parse_settings(["--device", "cpu", *flags]))
    return load_clip(Clip(name), settings, folder)


def test_every_bad_clip_has_a_reason_that_a_person_understands(tmp_path, sound):
    folder = tmp_path / "audio"
    folder.mkdir()
    for name, says in write_bad_clips(folder, sound).items():
        clip = loaded(folder, name)
        assert says in clip.error, name
        assert "\n" not in clip.error and not clip.chunks
    assert loaded(folder, "good.wav").error == ""


def test_a_text_called_wav_brings_no_advice_to_install_anything(tmp_path):
    (tmp_path / "a.wav").write_text("I am a list of clips.\n" * 50)
    with pytest.raises(BadClip) as reason:
        read_audio(tmp_path / "a.wav", 1, 600)
    assert str(reason.value) == "not audio: it holds text"


def test_what_neither_library_reads_carries_both_messages(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"\xfe\x00\x81 no audio" * 50)
    with pytest.raises(BadClip, match=r"soundfile: .*Format not recognised.*torchaudio: "):
        read_audio(tmp_path / "a.wav", 1, 600)


@pytest.mark.parametrize("code, fault", [(2, errno.EIO), (17, errno.ENOMEM)])
def test_a_fault_of_the_machine_within_libsndfile_is_no_clips(code, fault, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"\0")

    def fail(name):
        raise soundfile.LibsndfileError(code)

    monkeypatch.setattr("encodec_tokenizer.Stream", fail)
    with pytest.raises(OSError) as error:
        loaded(tmp_path, "a.wav")
    assert error.value.errno == fault and error.value.filename == str(tmp_path / "a.wav")


@pytest.mark.parametrize("what", ["a form", "an encoding"])
def test_torchaudio_reads_what_soundfile_does_not_know(what, tmp_path, monkeypatch):
    data = b"\0no audio for soundfile" * 50
    if what == "an encoding":
        data = encoded(np.zeros(9_000), 8_000, "CAF", "PCM_16").replace(b"lpcm", b"aac ", 1)
    (tmp_path / "a.m4a").write_bytes(data)
    decoded = torch.stack([torch.ones(8_000), torch.zeros(8_000)])
    monkeypatch.setattr("torchaudio.load", lambda path: (decoded, 16_000))
    samples, rate = read_audio(tmp_path / "a.m4a", 1, 0.5)
    assert (rate, samples.shape[1]) == (16_000, 8_000)
    assert samples.eq(0.5).all()
    with pytest.raises(BadClip, match=r"0.5 s|--max_duration is 0.4 s"):
        read_audio(tmp_path / "a.m4a", 1, 0.4)


@contextmanager
def as_anyone():
    """Root may read all: for a while this process is nobody in particular."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_without_permission_is_a_bad_clip(tmp_path, sound, monkeypatch):
    tmp_path.chmod(0o755)
    for name in ("a.wav", "folder/b.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, sound(0.1), 44_100)
    monkeypatch.chdir(tmp_path)  # others cannot pass the folders above it
    with as_anyone():
        assert loaded(tmp_path.relative_to(tmp_path), "a.wav").error == ""
    (tmp_path / "a.wav").chmod(0)
    (tmp_path / "folder").chmod(0)
    with as_anyone():
        for name in ("a.wav", "folder/b.wav"):
            clip = loaded(tmp_path.relative_to(tmp_path), name)
            assert clip.error == "cannot be opened: Permission denied"
            assert clip.file is None
    (tmp_path / "folder").chmod(0o755)


def test_a_clip_beyond_max_duration_is_refused_before_it_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(44_100 * 3), 44_100)
    with pytest.raises(BadClip, match="3 s long, --max_duration is 2 s"):
        read_audio(tmp_path / "a.wav", 1, 2.0)
    assert "--max_duration is 2 s" in loaded(tmp_path, "a.wav", "--max_duration", "2").error


# ------------------------------------------------------------------ the truth is what was decoded

FORMATS = {
    "a.wav": ("WAV", "PCM_16"),
    "a.aiff": ("AIFF", "PCM_16"),
    "a.au": ("AU", "PCM_16"),
    "a.w64": ("W64", "PCM_16"),
    "b.wav": ("RF64", "PCM_16"),
    "a.caf": ("CAF", "PCM_16"),
    "a.flac": ("FLAC", "PCM_16"),
    "vorbis.ogg": ("OGG", "VORBIS"),
    "opus.ogg": ("OGG", "OPUS"),
    "a.mp3": ("MP3", "MPEG_LAYER_III"),
}


def encoded(samples, rate, kind, subtype, **options):
    """A file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype, **options)
    return file.getvalue()


@pytest.fixture
def ffmpeg_plays_what_is_left(monkeypatch):
    """torchaudio.load as with FFmpeg: it makes something of half a file, too."""

    def load(path):
        if path.stat().st_size < 12:
            raise RuntimeError("no decoder for it")
        return torch.ones(1, 9_000), 8_000

    monkeypatch.setattr("torchaudio.load", load)


@pytest.fixture(params=FORMATS)
def whole(request, sound, ffmpeg_plays_what_is_left):
    """A file of half a second: its name, its bytes, and its samples [T] decoded by soundfile."""
    samples = np.concatenate([sound(0.25, 48_000), sound(0.25, 48_000, seed=1)])
    data = encoded(samples, 48_000, *FORMATS[request.param])
    return request.param, data, soundfile.read(io.BytesIO(data), dtype="float32")[0]


def read_or_none(path):
    """The samples [T] of a file, None where it is refused."""
    try:
        return read_audio(path, 1, 600)[0][0].numpy()
    except BadClip as reason:
        assert "\n" not in str(reason)
        return None


def test_each_of_400_cuts_is_refused_or_gives_what_is_there(whole, tmp_path):
    """40 a format; half of them anywhere, the others where little is missing.

    What a cut file holds, libsndfile's own decoder says. The cuts that cannot be noticed: the last
    6 bytes of a CAF, for libsndfile takes its headers for audio there; and see
    test_an_mp3_without_a_tag_is_what_its_whole_frames_hold.
    """
    name, data, full = whole
    moments = random.Random(name)
    cuts = [moments.randrange(len(data)) for _ in range(20)]
    cuts += [
        len(data) - missing for missing in (*range(1, 11), *moments.sample(range(11, 600), 10))
    ]
    cut, other = tmp_path / f"cut_{name}", tmp_path / name
    other.write_bytes(data)
    for length in cuts:
        cut.write_bytes(data[:length])
        first = read_or_none(cut)
        assert np.array_equal(read_or_none(other), full)
        second = read_or_none(cut)
        assert (first is None) == (second is None), length
        if first is not None:
            assert np.array_equal(first, second), length  # not what the clip before it left
            there, _ = soundfile.read(cut, dtype="float32")
            assert np.array_equal(first, there) and np.array_equal(first, full[: len(first)])
            assert name == "a.caf" and len(data) - length <= 6, length


def test_half_a_file_is_refused_in_every_format(whole, tmp_path):
    name, data, _ = whole
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert read_or_none(tmp_path / name) is None


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_that_ends_with_a_page_but_not_its_last_is_refused(subtype, tmp_path, sound):
    data = encoded(sound(3.0, 48_000), 48_000, "OGG", subtype)
    pages = [match.start() for match in re.finditer(b"OggS", data)]
    assert len(pages) >= 4
    for end in pages[1:]:
        (tmp_path / "a.ogg").write_bytes(data[:end])
        assert read_or_none(tmp_path / "a.ogg") is None


def test_two_oggs_in_a_row_are_refused_with_a_reason(tmp_path, sound):
    """libsndfile knows the first alone."""
    for subtype in ("VORBIS", "OPUS"):
        one, two = (encoded(sound(0.3, 48_000, seed=i), 48_000, "OGG", subtype) for i in (0, 1))
        (tmp_path / "a.ogg").write_bytes(one + two)
        with pytest.raises(BadClip, match="several OGG streams"):
            read_audio(tmp_path / "a.ogg", 1, 600)


def mp3_frames(data):
    """Where the frames of an MPEG 1 layer III file start."""
    kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    starts, at = [], 0
    while at < len(data):
        header = int.from_bytes(data[at : at + 4], "big")
        assert header >> 17 == 0x7FFD  # sync, MPEG 1, layer III
        rate = (44_100, 48_000, 32_000)[header >> 10 & 3]
        starts.append(at)
        at += 144_000 * kbps[header >> 12 & 15] // rate + (header >> 9 & 1)
    return starts


MODES = {"CBR": "CONSTANT", "VBR": "VARIABLE"}
SAMPLES_IN_FRAME, ENCODER_DELAY = 1152, 1105  # of LAME, with the decoder's 529


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mp3(request, sound, ffmpeg_plays_what_is_left):
    """An MP3 of 4 s, its bytes, which begin with the frame that gives the length."""
    options = {"bitrate_mode": request.param, "compression_level": 0.3}
    return encoded(sound(4.0), 44_100, "MP3", "MPEG_LAYER_III", **options)


def test_an_mp3_whose_tag_promises_more_is_refused(mp3, tmp_path):
    """Cut within a frame, and between two, where what is left is sound as far as it goes."""
    frames = mp3_frames(mp3)
    assert {mp3[36:40], mp3[21:25]} & {b"Xing", b"Info"}
    for length in (len(mp3) // 2, *frames[2:-1:9], frames[-1]):
        (tmp_path / "a.mp3").write_bytes(mp3[:length])
        assert read_or_none(tmp_path / "a.mp3") is None


def test_an_mp3_without_a_tag_comes_out_whole(mp3, tmp_path):
    """With the tag goes the knowledge of the encoder's delay: that is heard as silence."""
    (tmp_path / "tagged.mp3").write_bytes(mp3)
    (tmp_path / "a.mp3").write_bytes(mp3[mp3_frames(mp3)[1] :])
    tagged, _ = read_audio(tmp_path / "tagged.mp3", 1, 600)
    ours, _ = read_audio(tmp_path / "a.mp3", 1, 600)
    assert tagged.shape[1] == 4 * 44_100
    assert ours.shape[1] == (len(mp3_frames(mp3)) - 1) * SAMPLES_IN_FRAME
    assert ours[:, ENCODER_DELAY:][:, : tagged.shape[1]].equal(tagged)


def test_an_mp3_without_a_tag_is_what_its_whole_frames_hold(mp3, tmp_path):
    """A cut between frames cannot be noticed: nothing says how many there were."""
    untagged = mp3[mp3_frames(mp3)[1] :]
    (tmp_path / "a.mp3").write_bytes(untagged)
    full, frames = read_or_none(tmp_path / "a.mp3"), mp3_frames(untagged)
    for count in (20, 60, 99):
        (tmp_path / "a.mp3").write_bytes(untagged[: frames[count]])
        ours = read_or_none(tmp_path / "a.mp3")
        assert len(ours) == count * SAMPLES_IN_FRAME
        assert np.array_equal(ours, full[: len(ours)])
        (tmp_path / "a.mp3").write_bytes(untagged[: frames[count] + 9])
        assert read_or_none(tmp_path / "a.mp3") is None


def test_two_mp3s_in_a_row_are_refused_or_read_whole(mp3, tmp_path):
    (tmp_path / "a.mp3").write_bytes(mp3 + mp3)
    with pytest.raises(BadClip, match="several MP3 files"):
        read_audio(tmp_path / "a.mp3", 1, 600)
    untagged = mp3[mp3_frames(mp3)[1] :]
    (tmp_path / "a.mp3").write_bytes(untagged + untagged)  # which is one MP3
    assert len(read_or_none(tmp_path / "a.mp3")) == 2 * len(mp3_frames(untagged)) * SAMPLES_IN_FRAME


def test_a_stream_of_unknown_length_is_no_truncated_file(tmp_path, sound):
    """ffmpeg leaves sizes of 0xFFFFFFFF where it writes to a pipe, others leave 0."""
    data = bytearray(encoded(sound(0.5), 44_100, "WAV", "PCM_16"))
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    for sizes in ((2**32 - 1, 2**32 - 1), (0, 0), (36, 0)):
        data[4:8], data[40:44] = (size.to_bytes(4, "little") for size in sizes)
        (tmp_path / "a.wav").write_bytes(data)
        assert np.array_equal(read_or_none(tmp_path / "a.wav"), expected)


def test_a_flac_stream_that_gives_no_number_of_samples_is_read(tmp_path, sound):
    data = bytearray(encoded(sound(0.5), 44_100, "FLAC", "PCM_16"))
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    # 36 bits behind STREAMINFO's block and frame sizes, rate, channels and depth.
    assert int.from_bytes(data[21:26], "big") % 2**36 == len(expected)
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    assert np.array_equal(read_or_none(tmp_path / "a.flac"), expected)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "IMA_ADPCM", "MS_ADPCM", "ULAW"])
def test_the_compressed_kinds_of_wav_are_read(subtype, tmp_path, sound):
    """In some of them libsndfile cannot seek, and then reads only what it is told to."""
    data = encoded(sound(1.0, 8_000), 8_000, "WAV", subtype)
    (tmp_path / "a.wav").write_bytes(data)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        expected = file.read(file.frames, dtype="float32")
    assert 8_000 <= len(expected) < 8_600  # whole blocks
    assert np.array_equal(read_or_none(tmp_path / "a.wav"), expected)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/fd"), reason="counts them where Linux shows them"
)
def test_200_clips_good_and_bad_leave_no_file_open(mp3, tmp_path, sound):
    kinds = {
        "good.mp3": mp3,
        "half.mp3": mp3[: len(mp3) // 2],
        "two.mp3": mp3 + mp3,
        "text.wav": b"text" * 99,
        "half.wav": encoded(sound(0.1), 44_100, "WAV", "PCM_16")[:999],
        "half.ogg": encoded(sound(0.5), 44_100, "OGG", "VORBIS")[:5000],
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
        read_or_none(tmp_path / name)
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for i in range(200):
        name = list(kinds)[i % len(kinds)]
        with_limit = 0.5 if i % 12 == 0 else 600  # given up in the middle, too
        with suppress(BadClip):
            read_audio(clip_path(tmp_path, name), 1, with_limit)
    deadline = time.monotonic() + 5  # a thread that feeds a pipe ends a moment after its reader
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert threading.active_count() <= threads
