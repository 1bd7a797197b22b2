"""Which aggregation keeps most of what tells labels apart? Measured on real, labelled clips.

    python tests/aggregations.py                                    FSDKaggle2019's curated clips
    python tests/aggregations.py --metadata esc50.csv --audio_dir ESC-50/audio
    python tests/aggregations.py --smoke                            the bundled clips

Tokenizes the clips once, writes a CSV with each --aggregate from the same codes, and predicts all
labels of a clip by logistic regression, cross-validated, from two sets of features: the token
columns as numbers, and the bag of codes (how often each code of each codebook occurs). The score is
lwlrap, the metric of FSDKaggle2019. Chance is the score of the labels' frequencies. All other flags
go to encodec_tokenizer.py.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer, scale
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "examples")]

import tagging  # noqa: E402

import encodec_tokenizer as script  # noqa: E402


def compressed(x: np.ndarray) -> np.ndarray:
    """[R, D] in at most R columns with the same inner products, all that the regression uses."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u * s


def cell(model: OneVsRestClassifier, x: np.ndarray, owners: np.ndarray, targets: np.ndarray) -> str:
    """The lwlrap over folds of clips; where a clip has several rows, their scores are added.

    x [R, D], dense or sparse; owners [R], the index of each row's clip; targets [clips, labels].
    """
    found = []
    for repeat in range(5):
        for train, test in KFold(5, shuffle=True, random_state=repeat).split(targets):
            seen = np.isin(owners, train)
            fitted = model.fit(x[seen], targets[owners[seen]])
            scores = np.zeros(targets.shape)
            np.add.at(scores, owners[~seen], fitted.predict_proba(x[~seen]))
            found.append(tagging.lwlrap(targets[test], scores[test]))
    return f"{np.mean(found):.3f} ± {np.std(found):.3f}"


def measure(path: Path, fewest: int) -> tuple[str, np.ndarray]:
    """The two cells of a CSV's line, and the targets [clips, labels] of its frequent labels."""
    clips, bags = tagging.read_bags(path)
    targets = MultiLabelBinarizer().fit_transform(clips["labels"].str.split(","))
    targets = targets[:, targets.sum(axis=0) >= fewest]
    stored = targets.any(axis=1)  # the others have rare labels only
    table = pd.read_csv(path, keep_default_na=False)
    table = table[table["fname"].isin(clips["fname"][stored])]
    targets, owners = targets[stored], pd.factorize(table["fname"])[0]
    tokens = compressed(scale(table.filter(regex=r"^token_\d+$")))
    plain = OneVsRestClassifier(LogisticRegression(C=0.01, solver="liblinear"))
    numbers = cell(plain, tokens, owners, targets)
    codes = cell(tagging.classifier(), bags[stored], np.arange(len(targets)), targets)
    return f"{numbers} | {codes}", targets


def main() -> None:
    flags, fewest = sys.argv[1:], 8  # clips of a label
    if {"-h", "--help"} & set(flags):
        sys.exit(__doc__)
    if "--smoke" in flags:
        flags, fewest = ["--dataset", "sample", "--weights", "untrained"], 2
    lines = ["| aggregation | token columns | bag of codes |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for how in tqdm(script.AGGREGATES, desc="aggregations"):
            more = ["--aggregate", how, "--output_dir", str(out), "--overwrite"]
            if script.main([*flags, *more]):
                sys.exit(1)
            with warnings.catch_warnings():  # a rare label may be missing from a fold
                warnings.simplefilter("ignore", UserWarning)
                cells, targets = measure(next(out.glob("tokenized_*.csv")), fewest)
            lines.append(f"| {how} | {cells} |")
    chance = tagging.lwlrap(targets, np.tile(targets.mean(axis=0), (len(targets), 1)))
    lines.append(f"\n{len(targets)} clips of {targets.shape[1]} labels; chance {chance:.3f}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
