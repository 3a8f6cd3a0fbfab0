"""Train the classifier that scores pictures: `python -m train.attribute_classifier --help`.

It learns every real picture of the data set, those that the generators never see included: a judge
should know what each combination looks like. That it judges by attributes and does not merely
recognize pictures is measured by a second training without the held-out ones, whose accuracy on
them goes into the card (`held_out_unseen`).
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxgen.models.attribute_classifier import AttributeClassifier, AttributeClassifierConfig
from train import openmoji
from train.scores import ATTRIBUTES, AttributeScorer, acceptable_genders, attribute_accuracy
from train.state import create_state, make_optimizer, make_train_step, take_apart


@dataclasses.dataclass(frozen=True)
class Config:
    """Train the attribute classifier on OpenMoji."""

    output: Path = Path("runs/attribute-classifier")
    """Folder that gets model, class names and card."""
    resolution: int = 64
    """Side of the pictures in pixels, 32 or 64."""
    steps: int = 4000
    """Number of updates."""
    batch_size: int = 256
    """Pictures a step."""
    learning_rate: float = 2e-3
    """Peak of the warm-up and cosine schedule of AdamW."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices."""
    seed: int = 0
    """Decides initialization, order and augmentation."""
    check_unseen: bool = True
    """Train a second time without the held-out pictures to measure accuracy on them."""
    subset: Literal["all", "people"] = "all"
    """people: one person with a skin tone each, as in train.text_to_image."""
    pictures: int | None = None
    """Use so many emoji only, for quick tries."""

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def augment(
    images: Float[Array, "batch size size 3"], key: PRNGKeyArray
) -> Float[Array, "batch size size 3"]:
    """Shift, scale, blur and add noise, so that slips of a generator do not count as another class.

    Colors stay: the skin tone is a color.

    Args:
        images: In [-1, 1], on white.
        key: Decides everything.
    """
    batch, size = images.shape[:2]
    keys = jax.random.split(key, 4)
    scales = jax.random.uniform(keys[0], (batch, 2), minval=0.9, maxval=1.1)
    shifts = jax.random.uniform(keys[1], (batch, 2), minval=-0.06, maxval=0.06) * size
    shifts += (1 - scales) * size / 2

    def place(ink, scale, shift):  # white paper is zero ink, which is also what lies outside
        return jax.image.scale_and_translate(ink, ink.shape, (0, 1), scale, shift, "linear")

    ink = jax.vmap(place)(1 - images, scales, shifts)
    blurred = jax.lax.reduce_window(ink, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / 9
    amounts = (
        jax.random.uniform(keys[2], (batch, 2, 1, 1, 1))
        * jnp.array([0.8, 0.15])[None, :, None, None, None]
    )
    ink += amounts[:, 0] * (blurred - ink)
    return 1 - ink + amounts[:, 1] * jax.random.normal(keys[3], images.shape)


def train(
    config: Config, emojis: openmoji.Emojis, *, show_progress: bool = True
) -> AttributeScorer:
    """Train on all `emojis` and return the scorer, with its accuracy on them in the card."""
    from tqdm import tqdm

    names = {name: getattr(emojis, f"{name}_names") for name in ATTRIBUTES}
    model_config = AttributeClassifierConfig(
        num_concepts=len(names["concept"]),
        num_genders=len(names["gender"]),
        num_skin_tones=len(names["skin_tone"]),
    )
    model = AttributeClassifier(model_config, rngs=nnx.Rngs(config.seed))
    skeleton, arrays = take_apart(model)
    warmup = min(200, config.steps // 4)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    optimizer = make_optimizer(rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)

    def loss(params, frozen, batch, key):
        pictures = augment(batch["image"].astype(jnp.float32) / 127.5 - 1, key)
        logits = skeleton.join(params | frozen)(pictures)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[name], batch[name])
            for name in ATTRIBUTES
        ]
        return jnp.mean(sum(losses))

    step = jax.jit(
        make_train_step(loss, optimizer, learning_rate=rate, ema_decay=0.998),
        donate_argnums=0,
    )
    state = create_state(arrays, {}, optimizer, config.seed)
    rng = np.random.default_rng(config.seed)
    started = time.monotonic()
    bar = tqdm(range(config.steps), unit="step", disable=not show_progress, mininterval=1.0)
    for index in bar:
        rows = rng.integers(len(emojis), size=config.batch_size)
        batch = {name: jnp.asarray(getattr(emojis, name)[rows]) for name in ATTRIBUTES}
        state, metrics = step(state, batch | {"image": jnp.asarray(emojis.images[rows])})
        if index % 50 == 49:
            bar.set_postfix(loss=f"{metrics['loss'].item():.3f}", refresh=False)
    card = {
        "task": "attributes of an emoji",
        "data": "OpenMoji",
        "attribution": openmoji.ATTRIBUTION,
        "pictures": len(emojis),
        "config": {name: _plain(value) for name, value in dataclasses.asdict(config).items()},
        "hardware": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds": round(time.monotonic() - started, 1),
    }
    scorer = AttributeScorer(skeleton.join(state.ema), names, card)
    everything = accuracy_on(scorer, emojis, np.arange(len(emojis)))
    return dataclasses.replace(scorer, card=card | {"accuracy_on_training_pictures": everything})


def accuracy_on(
    scorer: AttributeScorer, emojis: openmoji.Emojis, rows: np.ndarray
) -> dict[str, float]:
    """Score real pictures."""
    ids, _ = scorer.read(emojis.images[rows])
    return attribute_accuracy(ids, emojis, rows, acceptable_genders(emojis))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    """Parse the command line, train, save, and print the card."""
    import tyro

    config = tyro.cli(Config, prog="python -m train.attribute_classifier")
    emojis = openmoji.load(config.resolution, limit=config.pictures)
    if config.subset == "people":
        emojis = emojis.select(emojis.composed)
    scorer = train(config, emojis)
    scorer.save(config.output)
    held_out = np.flatnonzero(emojis.held_out)
    if config.check_unseen and held_out.size:
        judge = train(config, emojis.train)
        unseen = {"held_out_unseen": accuracy_on(judge, emojis, held_out)}
        scorer = dataclasses.replace(scorer, card=dict(scorer.card) | unseen)
        scorer.save(config.output)
    for name in ("accuracy_on_training_pictures", "held_out_unseen"):
        print(name, scorer.card.get(name), file=sys.stderr)
    print(f"saved {config.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
