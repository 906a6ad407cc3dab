"""What changes from step to step: four small arrays on the device, so that a step never waits for the host.

========  ============  ==================================================================================================
array     shape, dtype  entries
========  ============  ==================================================================================================
counters  (2,) int64    STEPS: steps taken; CURSOR: first row of the next mini-batch in the shuffled order
rate      (1,) float64  the base learning rate
scalars   (8,) real     RATE: this step's learning rate; C1, C2: constants of the optimizer; FACTOR: the gradient's
                        factor; NORM: the gradient's norm; SCALE: the loss scale; GOOD: good steps since it last
                        changed; SKIP: 1 if this step changes nothing
value     (2,) float64  this batch's loss; the sum of the losses since it was last set to 0
========  ============  ==================================================================================================
"""

STEPS, CURSOR = 0, 1
RATE, C1, C2, FACTOR, NORM, SCALE, GOOD, SKIP = range(8)

# Dynamic loss scaling for float16 (Micikevicius et al. (2018), section 3.2), with the numbers of torch.amp.GradScaler
FIRST_SCALE, SHRINK, GROW, GROW_AFTER = 65536.0, 0.5, 2.0, 2000.0
# and bounds: overflows in a row must not take the scale to 0, nor good steps to infinity
LEAST_SCALE, LARGEST_SCALE = 2.0**-24, 2.0**24
