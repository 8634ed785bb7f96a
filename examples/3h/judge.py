"""What a search of the example's models maximises: helpful, honest and harmless answers in world 0, in percent.

resm-kernels search examples/3h/recipes/space.yaml --evaluate examples.3h.judge:evaluate --trials 60 --out build/search
"""

from __future__ import annotations

from benchmarks.quality.searched import judge_of
from benchmarks.quality.world import World

evaluate = judge_of(World(0))
