"""Noise schedules, guidance and samplers: small frozen parts that compose into one program."""

from jaxgen.sampling.euler import VelocityFunction as VelocityFunction
from jaxgen.sampling.euler import euler_sample as euler_sample
from jaxgen.sampling.flow_matching import LogitNormal as LogitNormal
from jaxgen.sampling.flow_matching import add_noise as add_noise
from jaxgen.sampling.flow_matching import flow_matching_loss as flow_matching_loss
from jaxgen.sampling.flow_matching import timestep_of as timestep_of
from jaxgen.sampling.guidance import Conditioning as Conditioning
from jaxgen.sampling.guidance import classifier_free_guidance as classifier_free_guidance
from jaxgen.sampling.guided import Guided as Guided
from jaxgen.sampling.guided import SkipLayers as SkipLayers
from jaxgen.sampling.regions import active_count as active_count
from jaxgen.sampling.schedules import FlowMatchingSchedule as FlowMatchingSchedule
from jaxgen.sampling.schedules import shift_sigma as shift_sigma
from jaxgen.sampling.stages import Progress as Progress
from jaxgen.sampling.stages import stitch as stitch
from jaxgen.sampling.stitching import Alone as Alone
from jaxgen.sampling.stitching import HybridStitch as HybridStitch
from jaxgen.sampling.stitching import Policy as Policy
from jaxgen.sampling.stitching import SRDiffusion as SRDiffusion
from jaxgen.sampling.stitching import Stage as Stage
from jaxgen.sampling.stitching import TStitch as TStitch
from jaxgen.sampling.stitching import relative_cost as relative_cost
