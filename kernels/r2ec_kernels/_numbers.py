"""Numbers of floating-point arithmetic that several ops need."""

import math

UNIT = 2.0**-24  # rounding unit of float32
HUGE = 2.0**50  # norms outside [1/HUGE, HUGE] are not left to float32
TIED = 2.0**-21  # 4 ulp of float32: rewards of a group within it of the largest are tied
LOG2_E = math.log2(math.e)  # exp(x) = exp2(LOG2_E x): exp2 is half the cost of exp
