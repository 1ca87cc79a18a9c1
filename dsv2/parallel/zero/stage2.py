"""ZeRO-2: gradients are partitioned too. Each micro-batch reduces them in a bucket of 5e8 elements."""

from dsv2.parallel.zero.base import FP32, Job, copied_into_buckets
from dsv2.parallel.zero.stage1 import Stage1


class Stage2(Stage1):
    number = 2
    reduces_in_backward = True

    def traffic(self, micro_batches: int, weight_bytes: int) -> float:
        # Gradients are summed per micro-batch, weights gathered once per step.
        return (2 * micro_batches + 1) * weight_bytes

    def step_gradients(self, job: Job) -> float:
        return FP32 * self.all_owned(job)

    def reduction(self, job: Job) -> float:
        return copied_into_buckets(job)
