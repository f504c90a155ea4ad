"""Reading a GLM: what the residual stream says, who says it, what heads attend to, and whether the numbers hold."""

from glmlens.analysis.attribution import LogitAttribution, logit_attribution
from glmlens.analysis.circuits import OV, QK, QK_bias, composition, copying_scores
from glmlens.analysis.distance import DistanceProfile, PairUse, distance_profile, pair_use
from glmlens.analysis.entries import Reads, attended, who_reads
from glmlens.analysis.factored import Factored
from glmlens.analysis.heads import HeadScores, head_scores
from glmlens.analysis.leave_out import Droppable, LeftOut, droppable, leave_one_out
from glmlens.analysis.logit_lens import LogitLens, logit_lens
from glmlens.analysis.probes import Probe, probe
from glmlens.analysis.residual import accumulated_residual, decomposed_residual
from glmlens.analysis.rotary import ScoreParts, score_parts, wavelengths
from glmlens.analysis.selfcheck import SelfCheck, SelfCheckError, selfcheck

__all__ = [
    "OV",
    "QK",
    "DistanceProfile",
    "Droppable",
    "Factored",
    "HeadScores",
    "LeftOut",
    "LogitAttribution",
    "LogitLens",
    "PairUse",
    "Probe",
    "QK_bias",
    "Reads",
    "ScoreParts",
    "SelfCheck",
    "SelfCheckError",
    "accumulated_residual",
    "attended",
    "composition",
    "copying_scores",
    "decomposed_residual",
    "distance_profile",
    "droppable",
    "head_scores",
    "leave_one_out",
    "logit_attribution",
    "logit_lens",
    "pair_use",
    "probe",
    "score_parts",
    "selfcheck",
    "wavelengths",
    "who_reads",
]
