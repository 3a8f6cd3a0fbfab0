"""From a folder of weights to a result: load, call, look."""

from jaxgen.pipelines.stable_diffusion_3 import StableDiffusion3 as StableDiffusion3
from jaxgen.pipelines.stitched import Preview as Preview
from jaxgen.pipelines.stitched import StitchedTextToImage as StitchedTextToImage
from jaxgen.pipelines.stitched import stitched_cost as stitched_cost
from jaxgen.pipelines.text_to_image import TextToImage as TextToImage
from jaxgen.pipelines.text_to_text import TextToText as TextToText
from jaxgen.pipelines.text_to_video import TextToVideo as TextToVideo
from jaxgen.pipelines.texts import Texts as Texts
