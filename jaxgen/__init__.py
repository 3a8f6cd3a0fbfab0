"""INT8 attention that trains, and the diffusion transformers that use it, in JAX.

    import jaxgen as jg

    model = jg.TextToImage.from_pretrained("weights/openmoji-large")
    pictures = model(["woman firefighter dark skin tone"], seed=1)
    jg.image_grid(pictures)

The names here are for notebooks. Layers, models, samplers and file formats live in `jaxgen.layers`,
`jaxgen.models`, `jaxgen.sampling` and `jaxgen.checkpoints`; kernels in `kernels_pallas`.
"""

from jaxgen.models.mmdit import MMDiT as MMDiT
from jaxgen.models.mmdit import MMDiTConfig as MMDiTConfig
from jaxgen.pictures import image_grid as image_grid
from jaxgen.pipelines import TextToImage as TextToImage
from kernels_pallas import sage_attention as sage_attention

__all__ = ["MMDiT", "MMDiTConfig", "TextToImage", "image_grid", "sage_attention"]
__version__ = "0.1.0"
