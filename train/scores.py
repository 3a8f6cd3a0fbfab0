"""How good pictures are: do they show what the caption says, and are they distributed as real ones.

Both questions are put to the project's own attribute classifier. Accuracy counts how often it sees
concept, gender and skin tone of the caption; the Frechet distance compares the Gaussians that fit
its features of drawn and of real pictures (Heusel et al. 2017, arXiv:1706.08500, with our features
in place of Inception's, so the values compare with each other and with nobody else's).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from jaxgen.checkpoints import (
    config_from_json,
    config_to_json,
    export_flat,
    load_flat,
    load_safetensors,
    parse_json_object,
    save_safetensors,
    write_atomically,
)
from jaxgen.models.attribute_classifier import AttributeClassifier, AttributeClassifierConfig
from train.openmoji import Emojis

ATTRIBUTES = ("concept", "gender", "skin_tone")


@dataclasses.dataclass(frozen=True)
class AttributeScorer:
    """A trained classifier with the names of its classes.

    Attributes:
        classifier: Reads pictures in [-1, 1].
        names: For each attribute, what the class ids mean.
        card: How it was trained and what it reached.
    """

    classifier: AttributeClassifier
    names: Mapping[str, tuple[str, ...]]
    card: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "AttributeScorer":
        """Load what `save` wrote.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged or does not fit the configuration.
        """
        folder = Path(folder)
        text = (folder / "config.json").read_text(encoding="utf-8")
        config = config_from_json(AttributeClassifierConfig, text, str(folder / "config.json"))
        weights = folder / "model.safetensors"
        classifier = load_flat(
            lambda: AttributeClassifier(config, rngs=nnx.Rngs(0)),
            load_safetensors(weights),
            str(weights),
        )
        card = parse_json_object((folder / "card.json").read_bytes(), str(folder / "card.json"))
        names = parse_json_object((folder / "names.json").read_bytes(), str(folder / "names.json"))
        return cls(classifier, {name: tuple(names[name]) for name in ATTRIBUTES}, card)

    def save(self, folder: Path) -> None:
        """Write weights (as bfloat16), configuration, class names and card."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            key: array.astype(jnp.bfloat16) for key, array in export_flat(self.classifier).items()
        }
        save_safetensors(folder / "model.safetensors", arrays)
        config = dataclasses.replace(
            self.classifier.config, dtype=jnp.float32, param_dtype=jnp.float32
        )
        texts = {
            "config.json": config_to_json(config),
            "names.json": _json(dict(self.names)),
            "card.json": _json(dict(self.card)),
        }
        for name, text in texts.items():
            write_atomically(folder / name, [text.encode()])

    def read(
        self, images: UInt8[np.ndarray, "batch size size 3"], batch_size: int = 256
    ) -> tuple[dict[str, np.ndarray], Float[np.ndarray, "batch features"]]:
        """Classify pictures.

        Returns:
            The likeliest class id of each attribute, and the float32 features.
        """
        graphdef, state = nnx.split(self.classifier)
        parts = [
            _read(state, jnp.asarray(images[start : start + batch_size]), graphdef=graphdef)
            for start in range(0, len(images), batch_size)
        ]
        ids = {name: np.concatenate([np.asarray(p[0][name]) for p in parts]) for name in ATTRIBUTES}
        return ids, np.concatenate([np.asarray(part[1]) for part in parts])


def attribute_accuracy(
    ids: Mapping[str, np.ndarray], emojis: Emojis, rows: np.ndarray, genders: np.ndarray
) -> dict[str, float]:
    """Compare predicted class ids with the captions of `emojis[rows]`.

    Args:
        ids: Predicted id of each attribute, one for each row.
        emojis: The data set that the captions come from.
        rows: Which emoji each picture should show.
        genders: `acceptable_genders(emojis)`.

    Returns:
        The share of correct predictions for each attribute, their mean ("attributes"), and the
        share of pictures with all three correct ("all").
    """
    correct = {
        "concept": ids["concept"] == emojis.concept[rows],
        "gender": genders[rows, ids["gender"]],
        "skin_tone": ids["skin_tone"] == emojis.skin_tone[rows],
    }
    stacked = np.stack(list(correct.values()))
    shares = {name: float(hits.mean()) for name, hits in correct.items()}
    return shares | {"attributes": float(stacked.mean()), "all": float(stacked.all(0).mean())}


def acceptable_genders(emojis: Emojis) -> Bool[np.ndarray, "emoji genders"]:
    """Return which genders a picture may be taken for.

    OpenMoji draws some people identically for two genders. No picture can then tell them apart,
    so both answers count as right.
    """
    groups: dict[tuple[int, int, bytes], list[int]] = {}
    for row, image in enumerate(emojis.images):
        key = (int(emojis.concept[row]), int(emojis.skin_tone[row]), image.tobytes())
        groups.setdefault(key, []).append(row)
    accepted = np.zeros((len(emojis), len(emojis.gender_names)), bool)
    for rows in groups.values():
        accepted[np.ix_(rows, emojis.gender[rows])] = True
    return accepted


def frechet_distance(
    features: Float[np.ndarray, "samples features"],
    others: Float[np.ndarray, "others features"],
) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of the Gaussians that fit two samples.

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½). The trace of the root is the sum of the roots of the
    eigenvalues of C1^½ C2 C1^½, which is symmetric, so no complex numbers can arise.

    Raises:
        ValueError: Fewer than two samples, other feature counts, or values that are not finite.
    """
    features, others = np.asarray(features, np.float64), np.asarray(others, np.float64)
    if min(len(features), len(others)) < 2 or features.shape[1:] != others.shape[1:]:
        raise ValueError(
            "two samples of at least 2 feature vectors of one size are needed, got shapes "
            f"{features.shape} and {others.shape}"
        )
    if not (np.isfinite(features).all() and np.isfinite(others).all()):
        raise ValueError("features must be finite")
    difference = features.mean(0) - others.mean(0)
    first, second = np.cov(features, rowvar=False), np.cov(others, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    distance = difference @ difference + np.trace(first) + np.trace(second) - 2 * crossed
    return float(max(distance, 0.0))


def peak_signal_to_noise(
    pictures: UInt8[np.ndarray, "batch height width 3"],
    wanted: UInt8[np.ndarray, "batch height width 3"],
) -> Float[np.ndarray, "batch"]:
    """Return the peak signal-to-noise ratio of each picture in decibels, at most 100."""
    difference = pictures.astype(np.float64) - wanted
    error = np.mean(np.square(difference), axis=(1, 2, 3))
    return np.minimum(100.0, 10 * np.log10(255.0**2 / np.maximum(error, 1e-12)))


def structural_similarity(
    pictures: UInt8[np.ndarray, "batch height width 3"],
    wanted: UInt8[np.ndarray, "batch height width 3"],
) -> Float[np.ndarray, "batch"]:
    """Return the structural similarity of each picture (Wang et al. 2004), a mean over channels.

    Gaussian windows of 11 x 11 pixels with a deviation of 1.5, where they fit into the picture.
    """
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            x = np.apply_along_axis(np.convolve, axis, x, weights, "valid")
        return x

    a, b = (x.astype(np.float64) for x in (pictures, wanted))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    shared = blur(a * b) - mean_a * mean_b
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_a * mean_b + one) * (2 * shared + two)
    denominator = (mean_a**2 + mean_b**2 + one) * (var_a + var_b + two)
    return np.mean(numerator / denominator, axis=(1, 2, 3))


def bootstrap_interval(
    values: Float[np.ndarray, "samples"], *, share: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Return bounds that hold a share of the means of resampled values."""
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


@jax.jit(static_argnames="graphdef")
def _read(
    state: Any, images: UInt8[Array, "batch size size 3"], *, graphdef: Any
) -> tuple[dict[str, Array], Array]:
    classifier = nnx.merge(graphdef, state)
    pictures = images.astype(jnp.float32) / 127.5 - 1
    logits = classifier(pictures)
    return {name: jnp.argmax(logits[name], -1) for name in ATTRIBUTES}, classifier.features(
        pictures
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
