"""Which device holds which part of a language model that one alone cannot hold.

Two axes of a mesh of devices share a matrix. Over "tensor" the work is shared: the projections that
begin a branch are split by what they compute, those that end it by what they take, so that a
device needs what it computed itself and only sums leave it (Megatron-LM, arXiv:1909.08053). Over
"fsdp" only the memory is shared: the other side of every matrix, which is collected where it is
used (ZeRO, arXiv:1910.02054).
"""

from collections.abc import Callable

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# By the last part of the path of a layer; in our layout a kernel is (in, out).
_SPLIT_FIRST = {"embedding", "output", "down"}
_SPLIT_LAST = {"query", "key", "value", "gate", "up", "head"}


def decoder_sharding(
    mesh: Mesh, *, fsdp: str = "fsdp", tensor: str = "tensor"
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns a function that places the parameters of a `DiffusionLM` or `LanguageModel`.

    Queries, keys, values, gate and up are split over their output, the projections that end a
    branch over their input, the embedding and the head over the vocabulary, all by `tensor`; their
    other side by `fsdp`. Norms are repeated. So is a side that its axis does not divide.

    Args:
        mesh: the devices. An axis that it does not have is left out; a mesh of one of the two is
            therefore enough.
        fsdp: axis over which only memory is shared.
        tensor: axis over which the computation is shared, too. If it divides the number of key
            and value heads, every device has whole heads.

    Returns:
        A function from the dotted path and the shape of a parameter to its sharding.

    Raises:
        ValueError: the two axes are one.
    """
    if fsdp == tensor:
        raise ValueError(f"fsdp and tensor must be two axes, got {fsdp!r} for both")

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        layer, _, parameter = path.rpartition(".")
        part = layer.rpartition(".")[2]
        axes: tuple[str, ...] = ()
        if parameter in ("kernel", "embedding") and part in _SPLIT_FIRST:
            axes = tensor, fsdp
        elif parameter == "kernel" and part in _SPLIT_LAST:
            axes = fsdp, tensor
        sides = zip(shape, axes, strict=False)
        fits = lambda size, axis: axis in mesh.shape and size % mesh.shape[axis] == 0
        spec = [axis if fits(size, axis) else None for size, axis in sides]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return place
