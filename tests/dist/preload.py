"""What the fork server imports once for all ranks: torch, DeepSpeed, and the modules of train.py.

The imports start no thread, since a fork takes along only one. test_pool.py checks this.
"""

# ruff: noqa: F401
import gc

import deepspeed.runtime.zero.stage3
import torch._dynamo  # an optimizer imports it

import dsv2.hf.init_from
import dsv2.model.attention.grouped_module
import dsv2.model.attention.mla_module
import dsv2.moe.routers.softmax_topk_module
import dsv2.monitoring.monitor
import dsv2.monitoring.tracker
import dsv2.parallel.watchdog
import dsv2.training.batches
import dsv2.training.job
import dsv2.training.saver
import dsv2.training.signals
import dsv2.training.spikes
import tests.dist.jobs

gc.freeze()  # modules never go; without them, collecting a rank's garbage is quick, and copies no page
