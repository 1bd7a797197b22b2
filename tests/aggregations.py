"""Which aggregation keeps most of what tells labels apart? Measured on real, labelled clips.

    python tests/aggregations.py --weights untrained         Debian's Freesound clips, 10 labels
    python tests/aggregations.py --dataset curated --input_dir input    FSDKaggle2019
    python tests/aggregations.py --metadata esc50.csv --audio_dir audio any CSV of clips

Tokenizes the clips with each --aggregate, and predicts a clip's first label by logistic regression,
cross-validated, from two sets of features: the token columns as numbers, and the bag of codes (how
often each code of each codebook occurs). Chance is the share of the most frequent label. All other
flags go to encodec_tokenizer.py. Without a dataset, the clips are those of the Debian package
sonic-pi-samples (CC0, from Freesound), fetched with apt-get and named for their kind.
"""

import argparse
import ast
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import normalize, scale
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import encodec_tokenizer as script  # noqa: E402

FEWEST_CLIPS = 8  # of a label
FOLDS, REPEATS = 5, 5


def fetch_clips(folder: Path) -> list[str]:
    """Debian's sonic-pi-samples, as flags: "loop_amen.flac" is labelled "loop"."""
    get = ["apt-get", "download", "-qq", "sonic-pi-samples"]
    subprocess.run(get, cwd=folder, check=True, stderr=subprocess.DEVNULL)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    paths = sorted(folder.rglob("*.flac"))
    with (folder / "sonic_pi.csv").open("w", newline="") as file:
        rows = [(path.name, path.name.partition("_")[0]) for path in paths]
        csv.writer(file).writerows([("fname", "labels"), *rows])
    return ["--metadata", str(folder / "sonic_pi.csv"), "--audio_dir", str(paths[0].parent)]


def compressed(x: np.ndarray) -> np.ndarray:
    """[R, D] in at most R columns with the same inner products, all that the regression uses."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u * s


def accuracies(x: np.ndarray, clips: np.ndarray, labels: np.ndarray, c: float) -> list[float]:
    """Cross-validated accuracy over clips, one a repeat; where a clip has several rows, they vote.

    x [R, D]; clips [R], the index of each row's clip; labels [clips]; c: 1 / regularization.
    """
    found = []
    for repeat in range(REPEATS):
        right = 0
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=repeat)
        for train, test in folds.split(labels, labels):
            seen = np.isin(clips, train)
            model = LogisticRegression(C=c, max_iter=1000).fit(x[seen], labels[clips[seen]])
            votes = np.zeros((len(labels), len(model.classes_)))
            np.add.at(votes, clips[~seen], model.predict_log_proba(x[~seen]))
            right += (model.classes_[votes[test].argmax(axis=1)] == labels[test]).sum()
        found.append(right / len(labels))
    return found


def table_row(table: pd.DataFrame, labels: np.ndarray) -> list[str]:
    """The accuracies from the token columns and from the bag of codes of each clip."""
    codebooks, _ = ast.literal_eval(table["token_shape"].iloc[0])
    tokens = table.filter(regex=r"^token_\d+$").to_numpy()
    ids = tokens.reshape(len(tokens), codebooks, -1) + 1024 * np.arange(codebooks)[:, None]
    names, clips = np.unique(table["fname"], return_inverse=True)
    bags = np.zeros((len(names), 1024 * codebooks))
    np.add.at(bags, (clips[:, None], ids.reshape(len(ids), -1)), 1)
    cells = []
    for x, owners, c in (
        (scale(tokens), clips, 0.01),
        (normalize(bags), np.arange(len(names)), 100),
    ):
        found = accuracies(compressed(x), owners, labels, c)
        cells.append(f"{np.mean(found):.1%} ± {np.std(found):.1%}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_known_args()
    flags = sys.argv[1:]
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        if not {"--dataset", "--metadata"} & {flag.partition("=")[0] for flag in flags}:
            flags += fetch_clips(Path(folder))
        for how in script.AGGREGATES:
            out = Path(folder) / how
            if script.main([*flags, "--aggregate", how, "--output_dir", str(out)]):
                sys.exit(1)
            tables[how] = pd.concat(
                pd.read_csv(path, keep_default_na=False) for path in out.glob("tokenized_*.csv")
            )
    lines = ["| aggregation | token columns | bag of codes |", "|---|---|---|"]
    for how, table in tqdm(tables.items(), desc="cross-validation"):
        by_clip = table[["fname", "labels", "num_chunks"]].drop_duplicates("fname")
        by_clip = by_clip.set_index("fname").sort_index()
        by_clip["label"] = by_clip["labels"].str.partition(",")[0]
        sizes = by_clip["label"].value_counts()
        by_clip = by_clip[by_clip["label"].isin(sizes.index[sizes >= FEWEST_CLIPS])]
        table = table[table["fname"].isin(by_clip.index)]
        labels = by_clip["label"].to_numpy()
        lines.append(f"| {how} | {' | '.join(table_row(table, labels))} |")
    sizes, several = by_clip["label"].value_counts(), by_clip["num_chunks"].gt(1).mean()
    lines.append(f"{len(by_clip)} clips of {len(sizes)} labels, {several:.0%} of several chunks")
    lines[-1] += f"; chance {sizes.max() / len(by_clip):.1%}; ± over {REPEATS} x {FOLDS} folds"
    print("\n".join(lines))


if __name__ == "__main__":
    main()
