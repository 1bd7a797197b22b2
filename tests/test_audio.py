import errno
import io
import os
import random
import re
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import reference
import soundfile
import torch

from encodec_tokenizer import (
    BadClip,
    Clip,
    Dataset,
    load_clip,
    locate,
    parse_settings,
    read_audio,
    resampler,
    resolve_device,
)


@pytest.mark.parametrize("model_rate, model_channels", [(24_000, 1), (48_000, 2)])
@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_and_one_to_eight_channels(
    rate, channels, model_rate, model_channels, tmp_path, sound
):
    path = tmp_path / "a.wav"
    soundfile.write(path, sound(0.25, rate, channels), rate, subtype="FLOAT")
    samples, file_rate = read_audio(path, model_channels, 600)
    ours = resampler(file_rate, model_rate, "cpu")(samples)
    theirs = reference.load(path, model_rate, model_channels)
    assert ours.shape == theirs.shape
    assert ours.shape[0] == model_channels
    assert torch.allclose(ours, theirs, atol=1e-6)


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


# --------------------------------------------------------------------------------------- bad clips


def bad_clips(sound):
    """name -> its bytes, None for no such file; what its reason must say."""
    whole = encoded(sound(1.0), 44_100, "WAV", "FLOAT")
    flac = encoded(sound(1.0), 44_100, "FLAC", "PCM_16")
    absurd = {value: np.float32(value).tobytes() for value in (np.nan, np.inf, 3e38)}
    return {
        "missing.wav": (None, "audio/missing.wav"),
        "empty.wav": (b"", "empty file (0 bytes)"),
        "no_samples.wav": (encoded(np.zeros(0), 44_100, "WAV", "PCM_16"), "no samples"),
        "truncated.wav": (whole[:-9], "truncated: 176391 of 176400 bytes"),
        "truncated.flac": (flac[:9000], "damaged, or of a kind that libsndfile cannot decode (Err"),
        "text.wav": (b"This is not audio." * 99, "not audio: it holds text"),
        "page.mp3": (b"<!DOCTYPE html><title>404</title>", "not audio: it holds text"),
        "zeros.wav": (bytes(5_000), "(soundfile: Format not recognised.; torchaudio: "),
        "headless.au": (whole[99:], "(soundfile: Format not recognised.; torchaudio: "),
        "rate.wav": (whole[:24] + b"\xff\xff\xff\x7f" + whole[28:], "2147483647 Hz is not plaus"),
        **{f"{v}.wav": (whole[:-4] + end, "NaN, infinite or absurd") for v, end in absurd.items()},
        "": (None, "the name is empty"),
        "../good.wav": (None, "leads outside the audio folder; not opened"),
        "a/../../good.wav": (None, "leads outside the audio folder; not opened"),
        "/etc/hostname": (None, "leads outside the audio folder; not opened"),
        "C:\\clip.wav": (None, "leads outside the audio folder; not opened"),
        "..\\good.wav": (None, "leads outside the audio folder; not opened"),
        "nul\0.wav": (None, "NUL character"),
        "long" * 100 + ".wav": (None, "cannot be opened: File name too long"),
        "folder.wav": (None, "not a plain file"),
        "pipe.wav": (None, "not a plain file"),
    }


def loaded(folder, name):
    """The clip of that name, as a run loads it."""
    settings = resolve_device(parse_settings(["--device", "cpu"]))
    clip = Clip(name)
    clip.path, clip.stamp = locate(Dataset("clips", folder, (), []), name)
    return load_clip(clip, settings)


def test_every_bad_clip_has_a_reason_in_plain_words(tmp_path, sound):
    folder = tmp_path / "audio"
    (folder / "folder.wav").mkdir(parents=True)
    os.mkfifo(folder / "pipe.wav")
    for name, (data, says) in bad_clips(sound).items():
        if data is not None:
            (folder / name).write_bytes(data)
        clip = loaded(folder, name)
        assert says in clip.error, name
        assert "\n" not in clip.error and not clip.chunks


@pytest.mark.parametrize("code, fault", [(2, errno.EIO), (17, errno.ENOMEM)])
def test_libsndfiles_machine_faults_blame_no_clip(code, fault, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"\0")

    def fail(*args, **options):
        raise soundfile.LibsndfileError(code)

    monkeypatch.setattr("encodec_tokenizer.Stream", fail)
    with pytest.raises(OSError) as error:
        read_audio(tmp_path / "a.wav", 1, 600)
    assert error.value.errno == fault and error.value.filename == str(tmp_path / "a.wav")


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC", "OGG", "MP3"])
def test_an_io_error_hidden_by_libsndfile_blames_no_clip(kind, tmp_path, monkeypatch, sound):
    data = encoded(sound(0.5), 44_100, kind, None)
    (tmp_path / "a").write_bytes(data[: len(data) // 2])  # as read by libsndfile

    class Failing(io.FileIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda path, mode: Failing(path))
    with pytest.raises(OSError, match="Input/output error"):
        read_audio(tmp_path / "a", 1, 600)


@pytest.mark.parametrize("unknown", ["format", "encoding"])
def test_torchaudio_reads_what_libsndfile_does_not_know(unknown, tmp_path, monkeypatch):
    data = b"\0no audio for soundfile" * 50
    if unknown == "encoding":
        data = encoded(np.zeros(9_000), 8_000, "CAF", "PCM_16").replace(b"lpcm", b"aac ", 1)
    (tmp_path / "a.m4a").write_bytes(data)
    decoded = torch.stack([torch.ones(8_000), torch.zeros(8_000)])
    monkeypatch.setattr("torchaudio.load", lambda path: (decoded, 16_000))
    samples, rate = read_audio(tmp_path / "a.m4a", 1, 0.5)
    assert (rate, samples.shape) == (16_000, (1, 8_000))
    assert samples.eq(0.5).all()
    with pytest.raises(BadClip, match=r"^0\.5 s long, --max_duration is 0\.4 s$"):
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
            assert clip.stamp == clip.error
    (tmp_path / "folder").chmod(0o755)


def test_a_clip_beyond_max_duration_is_refused_with_its_length(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(18_000), 40_000)
    with pytest.raises(BadClip, match=r"^0\.45 s long, --max_duration is 0\.4 s$"):
        read_audio(tmp_path / "a.wav", 1, 0.4)


# ------------------------------------------------------------------------- truncated and damaged

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


def read_or_none(path, data=None):
    """The samples [T] of a file, None if it is refused; `data` are written to it first."""
    if data is not None:
        path.write_bytes(data)
    try:
        return read_audio(path, 1, 600)[0][0].numpy()
    except BadClip as reason:
        assert "\n" not in str(reason)
        return None


def test_each_of_400_cuts_is_refused(whole, tmp_path):
    """40 a format: the half, 19 anywhere, and 20 where little is missing."""
    name, data, full = whole
    chance = random.Random(name)
    cuts = [len(data) // 2, *(chance.randrange(len(data)) for _ in range(19))]
    cuts += [len(data) - missing for missing in (*range(1, 11), *chance.sample(range(11, 600), 10))]
    for length in cuts:
        assert read_or_none(tmp_path / f"cut_{name}", data[:length]) is None, length
        assert np.array_equal(read_or_none(tmp_path / name, data), full)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_with_a_missing_or_damaged_page_is_refused(subtype, tmp_path, sound):
    data = encoded(sound(3.0, 48_000), 48_000, "OGG", subtype)
    pages = [match.start() for match in re.finditer(b"OggS", data)]
    assert len(pages) >= 4
    for page in pages[1:]:
        assert read_or_none(tmp_path / "a.ogg", data[:page]) is None
        flipped = bytearray(data)
        flipped[page + 100] ^= 4
        assert read_or_none(tmp_path / "a.ogg", flipped) is None
    assert read_or_none(tmp_path / "a.ogg", data + data) is None  # libsndfile reads the first


@pytest.mark.parametrize("subtype", ["PCM_16", "ALAC_16"])
def test_a_caf_with_bytes_too_few_or_too_many_is_refused(subtype, tmp_path, sound):
    data = encoded(sound(0.5), 44_100, "CAF", subtype)
    assert len(read_or_none(tmp_path / "a.caf", data)) == 22_050
    middle = len(data) // 2
    for damaged in (data[:-4], data[:middle] + bytes(16) + data[middle:]):
        assert read_or_none(tmp_path / "a.caf", damaged) is None


def test_a_chunk_behind_the_audio_of_a_w64_is_not_audio(tmp_path, sound):
    data = encoded(sound(0.5), 44_100, "W64", "PCM_16")
    chunk = b"list\x2f\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0" + (512).to_bytes(8, "little")
    padding = bytes(-len(data) % 8)
    assert read_or_none(tmp_path / "a.w64", data + padding + chunk + bytes(488)) is None


# -------------------------------------------------------------------------------------------- MP3


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


SAMPLES_IN_FRAME, ENCODER_DELAY = 1152, 1105  # of LAME, with the decoder's 529


@pytest.fixture(params=["CONSTANT", "VARIABLE"])
def mp3(request, sound, ffmpeg_plays_what_is_left):
    """An MP3 of 4 s, its bytes, which begin with the frame that gives the length."""
    options = {"bitrate_mode": request.param, "compression_level": 0.3}
    return encoded(sound(4.0), 44_100, "MP3", "MPEG_LAYER_III", **options)


def test_an_mp3_whose_tag_promises_more_is_refused(mp3, tmp_path):
    frames = mp3_frames(mp3)
    assert {mp3[36:40], mp3[21:25]} & {b"Xing", b"Info"}
    for length in (len(mp3) // 2, *frames[2:-1:9], frames[-1]):
        assert read_or_none(tmp_path / "a.mp3", mp3[:length]) is None


def test_an_mp3_without_a_tag_is_read_to_its_last_whole_frame(mp3, tmp_path):
    """Without the tag, the encoder's delay is not known and is heard as silence."""
    tagged = read_or_none(tmp_path / "a.mp3", mp3)
    assert len(tagged) == 4 * 44_100
    untagged = mp3[mp3_frames(mp3)[1] :]
    frames = mp3_frames(untagged)
    full = read_or_none(tmp_path / "a.mp3", untagged)
    assert len(full) == len(frames) * SAMPLES_IN_FRAME
    assert np.array_equal(full[ENCODER_DELAY:][: len(tagged)], tagged)
    for count in (20, 60, 99):  # nothing says how many frames there were
        ours = read_or_none(tmp_path / "a.mp3", untagged[: frames[count]])
        assert np.array_equal(ours, full[: count * SAMPLES_IN_FRAME])
        assert read_or_none(tmp_path / "a.mp3", untagged[: frames[count] + 9]) is None


APE = 2 * (b"APETAGEX\xd0\7\0\0\x20" + bytes(19))  # header and footer; size 32 counts the latter
ID3V1 = b"TAG" + bytes(range(125))


def test_tags_behind_an_mp3_are_no_audio(mp3, tmp_path):
    expected = read_or_none(tmp_path / "a.mp3", mp3)
    for tags in (ID3V1, APE, APE + ID3V1, bytes(3000)):
        assert np.array_equal(read_or_none(tmp_path / "a.mp3", mp3 + tags), expected)


def test_a_second_mp3_in_the_file_is_refused_or_read(mp3, tmp_path):
    untagged = mp3[mp3_frames(mp3)[1] :]
    for behind in (mp3, untagged, ID3V1 + mp3, APE + mp3, APE + untagged):
        assert read_or_none(tmp_path / "a.mp3", mp3 + behind) is None
    frames = 2 * len(mp3_frames(untagged))  # without tags it is one MP3
    assert len(read_or_none(tmp_path / "a.mp3", untagged * 2)) == frames * SAMPLES_IN_FRAME


def test_16_bytes_missing_in_an_mp3_cost_two_frames_or_the_clip(mp3, tmp_path):
    frames = mp3_frames(mp3)
    for frame in frames[10:130:10]:
        ours = read_or_none(tmp_path / "a.mp3", mp3[frames[1] : frame + 90] + mp3[frame + 106 :])
        assert ours is None or len(ours) >= (len(frames) - 3) * SAMPLES_IN_FRAME


def test_an_mp3_of_free_format_is_refused(mp3, tmp_path):
    free = bytearray(mp3[mp3_frames(mp3)[1] :])
    for start in mp3_frames(bytes(free)):
        free[start + 2] &= 0x0F  # the bit rate
    assert read_or_none(tmp_path / "a.mp3", free) is None


# --------------------------------------------------------------- sizes that were never filled in

COMMENT = b"LIST" + (26).to_bytes(4, "little") + b"INFOICMT" + (14).to_bytes(4, "little")
COMMENT += b"data of a dog\0"


def wav(samples, comment, riff_size, data_size):
    """A WAV's bytes with the given sizes, and with or without a comment before its audio."""
    data = encoded(samples, 44_100, "WAV", "PCM_16")
    sizes = [size.to_bytes(4, "little") for size in (riff_size, data_size)]
    return b"RIFF" + sizes[0] + data[8:36] + comment + b"data" + sizes[1] + data[44:]


@pytest.mark.parametrize("comment", [b"", COMMENT], ids=["bare", "comment"])
def test_a_wav_from_a_pipe_is_read_whole(comment, tmp_path, sound):
    expected = read_or_none(tmp_path / "a.wav", encoded(sound(0.5), 44_100, "WAV", "PCM_16"))
    for sizes in ((2**32 - 1, 2**32 - 1), (0, 0), (36 + len(comment), 0)):
        data = wav(sound(0.5), comment, *sizes)
        assert np.array_equal(read_or_none(tmp_path / "a.wav", data), expected), sizes


@pytest.mark.parametrize("comment", [b"", COMMENT], ids=["bare", "comment"])
@pytest.mark.parametrize("tag", [ID3V1, b"id3 " + bytes(26), COMMENT], ids=["TAG", "id3", "LIST"])
def test_a_tag_behind_a_wav_without_audio_is_no_audio(tag, comment, tmp_path):
    data = wav(np.zeros(0), comment, 36 + len(comment), 0)
    assert read_or_none(tmp_path / "a.wav", data + tag) is None


def test_an_aiff_from_a_pipe_is_read_whole(tmp_path, sound):
    """sox leaves a size of 0x7F000008 for the audio."""
    data = encoded(sound(0.5), 44_100, "AIFF", "PCM_16")
    expected = read_or_none(tmp_path / "a.aiff", data)
    at = data.index(b"SSND") + 4
    piped = data[:at] + b"\x7f\0\0\x08" + data[at + 4 :]
    assert np.array_equal(read_or_none(tmp_path / "a.aiff", piped), expected)


def test_a_flac_without_its_number_of_samples_is_read(tmp_path, sound):
    data = bytearray(encoded(sound(0.5), 44_100, "FLAC", "PCM_16"))
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    # STREAMINFO's last 36 bits before its MD5.
    assert int.from_bytes(data[21:26], "big") % 2**36 == len(expected)
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    assert np.array_equal(read_or_none(tmp_path / "a.flac", data), expected)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "IMA_ADPCM", "MS_ADPCM", "ULAW"])
def test_the_compressed_kinds_of_wav_are_read(subtype, tmp_path, sound):
    """libsndfile cannot seek in some of them."""
    data = encoded(sound(1.0, 8_000), 8_000, "WAV", subtype)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        expected = file.read(file.frames, dtype="float32")
    assert 8_000 <= len(expected) < 8_600  # whole blocks
    assert np.array_equal(read_or_none(tmp_path / "a.wav", data), expected)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux counts open files there")
def test_200_clips_good_and_bad_leave_no_file_open(mp3, tmp_path, sound):
    kinds = [mp3, mp3[: len(mp3) // 2], mp3 + mp3, b"text" * 99]
    kinds.append(encoded(sound(0.1), 44_100, "WAV", "PCM_16")[:999])
    kinds.append(encoded(sound(0.5), 44_100, "OGG", "VORBIS")[:5000])
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for i in range(200):
        (tmp_path / "a").write_bytes(kinds[i % len(kinds)])
        with suppress(BadClip):
            read_audio(tmp_path / "a", 1, 0.5 if i % 12 == 0 else 600)  # some stop in the middle
    deadline = time.monotonic() + 5  # a thread that feeds a pipe ends a moment after its reader
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert threading.active_count() <= threads
