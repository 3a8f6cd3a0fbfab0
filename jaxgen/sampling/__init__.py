"""Noise schedules, guidance and samplers: small frozen parts that compose into one program."""

from jaxgen.sampling.euler import VelocityFunction as VelocityFunction
from jaxgen.sampling.euler import euler_sample as euler_sample
from jaxgen.sampling.flow_matching import LogitNormal as LogitNormal
from jaxgen.sampling.flow_matching import add_noise as add_noise
from jaxgen.sampling.flow_matching import flow_matching_loss as flow_matching_loss
from jaxgen.sampling.flow_matching import timestep_of as timestep_of
from jaxgen.sampling.guidance import Conditioning as Conditioning
from jaxgen.sampling.guidance import classifier_free_guidance as classifier_free_guidance
from jaxgen.sampling.schedules import FlowMatchingSchedule as FlowMatchingSchedule
from jaxgen.sampling.schedules import shift_sigma as shift_sigma
