"""Analyses of a GLM: logit lens, attribution, attention heads, circuits, KV-cache reads, probes and the self-check."""

from glmlens.analysis.attention_distance import DistanceProfile, PairUse, distance_profile, pair_use
from glmlens.analysis.cache_reads import CacheReads, cache_reads, sum_attention
from glmlens.analysis.factored import Factored
from glmlens.analysis.heads import HeadScores, head_scores
from glmlens.analysis.leave_one_out import EvictionCurve, LeaveOneOut, eviction_curve, leave_one_out
from glmlens.analysis.logit_attribution import LogitAttribution, logit_attribution
from glmlens.analysis.logit_lens import LogitLens, logit_lens
from glmlens.analysis.probes import Probe, probe
from glmlens.analysis.qk_ov_circuits import OV, QK, QK_bias, composition, copying_scores
from glmlens.analysis.residual import accumulated_residual, decompose_residual
from glmlens.analysis.rotary import ScoreParts, score_parts, wavelengths
from glmlens.analysis.selfcheck import SelfCheck, SelfCheckError, selfcheck
from glmlens.deprecated import resolve_old_names

__all__ = [
    "OV",
    "QK",
    "CacheReads",
    "DistanceProfile",
    "EvictionCurve",
    "Factored",
    "HeadScores",
    "LeaveOneOut",
    "LogitAttribution",
    "LogitLens",
    "PairUse",
    "Probe",
    "QK_bias",
    "ScoreParts",
    "SelfCheck",
    "SelfCheckError",
    "accumulated_residual",
    "cache_reads",
    "composition",
    "copying_scores",
    "decompose_residual",
    "distance_profile",
    "eviction_curve",
    "head_scores",
    "leave_one_out",
    "logit_attribution",
    "logit_lens",
    "pair_use",
    "probe",
    "score_parts",
    "selfcheck",
    "sum_attention",
    "wavelengths",
]

OLD_NAMES = {
    "Droppable": "glmlens.analysis.EvictionCurve",
    "LeftOut": "glmlens.analysis.LeaveOneOut",
    "Reads": "glmlens.analysis.CacheReads",
    "attended": "glmlens.analysis.sum_attention",
    "decomposed_residual": "glmlens.analysis.decompose_residual",
    "droppable": "glmlens.analysis.eviction_curve",
    "who_reads": "glmlens.analysis.cache_reads",
}
__getattr__ = resolve_old_names("glmlens.analysis", OLD_NAMES)
