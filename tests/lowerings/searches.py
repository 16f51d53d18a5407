"""How hypothesis searches for inputs that a kernel gets wrong, under Triton's interpreter."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

# The same inputs at every run. To shrink a failure, a launch for every smaller input, takes minutes.
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
