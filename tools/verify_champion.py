"""Check an exported version of a registered model without the project that made it, and without a network.

    mlflow artifacts download -u models:/kubealign@champion -d champion
    python verify_champion.py champion --public-key KEY

KEY is the line that `kubealign keys` prints, or a PEM file; get it from whom you trust, not from where the model was.
Needs `cryptography`. It checks the signature of statement.json and the sha256 of every file, and derives the verdict:
the improvement from the scores of the pairs, p-values by a bootstrap of its own, every rule of the gate. Nothing of the
model is run. Exit code: 0 the statement holds and the model passed the gate; 3 it holds but the model did not pass (if
it is champion, then by force); 1 it does not hold.
"""

import argparse
import base64
import hashlib
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

TYPE = "application/vnd.in-toto+json"
FORM = b'{"payload":"%b","payloadType":"%b","signatures":[{"keyid":"%b","sig":"%b"}]}'
STATEMENT = ("https://in-toto.io/Statement/v1", "urn:kubealign:judgement:1")
NOT_SIGNED = {"statement.json", "registered_model_meta"}  # the second is a note of MLflow's that nobody reads
PER_TOKEN = {"ipo", "orpo", "sigmoid_norm", "simpo"}  # losses whose beta does not scale log-ratios of whole answers
RESAMPLES = 2000


def read_statement(path, key):
    """The predicate and the files' hashes, if this key signed them and not a byte was changed since."""
    envelope = json.loads(path.read_bytes())
    payload, proof = (base64.b64decode(part) for part in (envelope["payload"], envelope["signatures"][0]["sig"]))
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signer = hashlib.sha256(pem).hexdigest().encode()
    if FORM % (base64.b64encode(payload), TYPE.encode(), signer, base64.b64encode(proof)) != path.read_bytes():
        raise ValueError("statement.json was changed, or signed with another key")
    encoded = b"DSSEv1 %d %b %d %b" % (len(TYPE), TYPE.encode(), len(payload), payload)
    key.verify(proof, encoded, ec.ECDSA(hashes.SHA256()))
    document = json.loads(payload)
    if (document["_type"], document["predicateType"]) != STATEMENT:
        raise ValueError("statement.json states something else")
    return document["predicate"], {file["name"]: file["digest"]["sha256"] for file in document["subject"]}


def check_files(folder, expected):
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    found = {name: path for name, path in found.items() if name not in NOT_SIGNED}
    for name in sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"{name} is {'missing' if name in expected else 'not a file of the statement'}")
    for name, path in found.items():
        with path.open("rb") as file:
            if path.is_symlink() or hashlib.file_digest(file, "sha256").hexdigest() != expected[name]:
                raise ValueError(f"{name} was changed")


def fit_scale(margins, weights, halvings):
    """The scale of lowest log-loss with smoothed targets (Platt), by bisection on its logarithm."""
    unit = math.sqrt(sum(m * m for m in margins) / len(margins)) or 1.0
    n, pairs = sum(weights), [(m / unit, w) for m, w in zip(margins, weights, strict=True) if w]
    low, high, target = math.log(1e-4), math.log(1e2), (n + 1) / (n + 2)
    for _ in range(halvings):
        middle = (low + high) / 2
        scale = math.exp(middle)
        too_high = sum(w * (0.5 + 0.5 * math.tanh(0.5 * scale * m) - target) * m for m, w in pairs) > 0
        low, high = (low, middle) if too_high else (middle, high)
    return math.exp((low + high) / 2) / unit


def resampled(pairs, rng):
    """How often each pair is in a resample of whole prompt groups."""
    groups = sorted({pair["group"] for pair in pairs})
    counts = Counter(rng.choices(groups, k=len(groups)))
    return [counts[pair["group"]] for pair in pairs]


def derive(evaluation, rival, gate):
    """Improvement, its p-value, and the p-value of a regression in each language, from the scores of the pairs."""
    test, validation, rng = evaluation["held_out"], evaluation["calibration"], random.Random(0)
    fitted = {name: [pair["margins"][name] for pair in validation] for name in ("policy", rival)}
    margins = {name: [pair["margins"][name] for pair in test] for name in fitted}
    threshold = gate["margin"] if gate["test"] == "superiority" else -gate["margin"]

    def gains(used, halvings):
        """Log-loss -log sigmoid(scale * margin / 2) of the rival minus the policy's, of each pair."""
        halves = {name: -0.5 * fit_scale(values, used, halvings) for name, values in fitted.items()}
        loss = [[softplus(halves[name] * margin) for margin in margins[name]] for name in (rival, "policy")]
        return [other - ours for other, ours in zip(*loss, strict=True)]

    def softplus(x):
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    def mean_of(values, weights):
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)

    gain = gains([1] * len(validation), 24)
    mean = sum(gain) / len(gain)
    members = {}
    for index, pair in enumerate(test):
        members.setdefault(pair["group"], []).append(index)

    def spread(about, weights):
        groups = [(weights[group[0]], sum(gain[i] - about for i in group)) for group in members.values()]
        return math.sqrt(sum(weight * deviation**2 for weight, deviation in groups))

    error = spread(mean, [1] * len(test))
    t = (mean - threshold) * len(gain) / error if error else math.inf if mean > threshold else -math.inf
    percentile, studentized, regressed = 0, 0, {pair["lang"]: [] for pair in test}
    for _ in range(RESAMPLES):
        weights, now = resampled(test, rng), gains(resampled(validation, rng), 14)
        percentile += mean_of(now, weights) <= threshold
        about = mean_of(gain, weights)
        error = spread(about, weights)
        studentized += not error or not (about - mean) * sum(weights) / error < t
        for lang, found in regressed.items():
            part = [w * (pair["lang"] == lang) for w, pair in zip(weights, test, strict=True)]
            if any(part):
                found.append(-mean_of(now, part) <= gate["max_language_regression"])
    share = (1 + max(percentile, studentized)) / (1 + RESAMPLES)
    return mean, share, {lang: (1 + sum(found)) / (1 + len(found)) for lang, found in regressed.items()}


def differ(name, stated, derived, resamples):
    """Refuse two p-values, each from resamples of its own, that are further apart than chance explains."""
    p = min(max(stated, derived, 1 / RESAMPLES), 1 - 1 / RESAMPLES)
    if abs(stated - derived) > 5 * math.sqrt(p * (1 - p) * (1 / RESAMPLES + 1 / resamples)) + 2 / resamples:
        raise ValueError(f"{name} is stated as {stated:.4g}, but the scores give {derived:.4g}")


def rules(said, evaluation, comparison, rival):
    """Whether each rule of the gate holds."""
    gate, k, models = said["gate"], said["decision_index"], evaluation["models"]
    ours, theirs = models["policy"]["generation"], models[rival]["generation"]
    level = gate["language_alpha"] / max(1, len(comparison["regression_p"]))
    yield gate["test"], comparison["p_value"] <= gate["alpha"] / (k * (k + 1))
    yield "min_pairs", len(evaluation["held_out"]) >= gate["min_pairs"]
    if evaluation["beta"] is not None and evaluation["loss_type"] not in PER_TOKEN:
        yield "policy_loss", models["policy"]["policy_metrics"]["loss"]["value"] < gate["max_policy_loss"]
    for name, low, high in (
        ("kl", -math.inf, "max_kl"),
        ("length_ratio", gate["min_length_ratio"], "max_length_ratio"),
    ):
        if ours and ours[name] and "sft" in models:
            yield name, low <= ours[name]["value"] <= gate[high]
    if ours and theirs:
        increase = ours["greedy"]["repetition"]["value"] - theirs["greedy"]["repetition"]["value"]
        yield "repetition", increase <= gate["max_repetition_increase"]
    yield from ((f"no_regression_{lang}", p > level) for lang, p in comparison["regression_p"].items())
    yield "committed_data", said["data"]["clean"] or not gate["require_committed_data"]


def verify(folder, key):
    """Check the folder; returns the predicate, the rules that fail, and what was derived."""
    said, files = read_statement(folder / "statement.json", key)
    check_files(folder, files)
    evaluation = json.loads((folder / "artifacts" / "evaluation.json").read_bytes())
    first = "sft" if "sft" in evaluation["models"] else "base"
    judged, rival = evaluation["judged"], "incumbent" if said["incumbent"]["version"] else first
    about = {"incumbent": said["incumbent"]["version"], "incumbent_statement": said["incumbent"]["statement"]}
    about |= {"test_set": said["test"]["set"], "decision_index": said["decision_index"]}
    if about != {name: judged[name] for name in about}:
        raise ValueError("evaluation.json is about another comparison than the statement")
    comparison = evaluation["comparisons"][rival]
    stated, resamples = comparison["improvement"]["value"], evaluation["bootstrap_resamples"]
    mean, p_value, regression = derive(evaluation, rival, said["gate"])
    if not math.isclose(mean, stated, rel_tol=1e-6, abs_tol=1e-6):
        raise ValueError(f"improvement is stated as {stated:.6g}, but the scores give {mean:.6g}")
    differ("p_value", comparison["p_value"], p_value, resamples)
    for lang in regression.keys() | comparison["regression_p"].keys():
        differ(f"regression_p {lang}", comparison["regression_p"][lang], regression[lang], resamples)
    failed = [name for name, holds in rules(said, evaluation, comparison, rival) if not holds]
    if said["passed"] == bool(failed):
        raise ValueError(f"the statement says passed={said['passed']}, but these rules fail: {failed or 'none'}")
    return said, failed, f"{mean:+.4f} nats better than {rival}, p = {p_value:.4f} by {RESAMPLES} resamples of its own"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--public-key", required=True, help="the line that `kubealign keys` prints, or a PEM file")
    given = parser.parse_args()
    try:
        named = Path(given.public_key).read_text() if Path(given.public_key).is_file() else given.public_key
        der = base64.b64decode(
            "".join(x for x in named.split("\n") if "-----" not in x), validate=True
        )  # PEM, or its one line
        said, failed, derived = verify(given.folder, serialization.load_der_public_key(der))
    except Exception as error:  # whatever it is, nothing was shown to hold
        sys.exit(f"refused: {type(error).__name__} {error}")
    print(f"holds: {said['model']}, decision {said['decision_index']} on test set {said['test']['set']}: {derived}")
    print(f"verdict: {said['verdict']}{'; rules that fail: ' + ', '.join(failed) if failed else '; every rule holds'}")
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main()
