"""Batches on more than one machine: `AgentPredictor` for Ray Data (needs the extra ``ray``).

::

    from anyagent.batch import BatchConfig
    from anyagent.ray import AgentPredictor, PredictorConfig

    config = PredictorConfig(BatchConfig("ws://localhost:8000/ws"), total_in_flight=256)
    answers = prompts.map_batches(  # a ray.data.Dataset with a column "text"
        AgentPredictor,
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=4),
        num_cpus=0.5,
        batch_size=64,
    )

**How often an agent sees a row.** Once, as long as nothing breaks; what is tried again after an error is for
``BatchConfig.retry`` to say. But Ray runs a task again whose actor has died, and with it every row of its
block, answered or not. So an agent can see a row twice, while in the output it is once. Small blocks
(``Dataset.repartition``) make that cheap.

In the output once: that holds as long as Ray makes one block of what comes of one, which it does up to
``DataContext.target_max_block_size`` (128 MiB). It cuts what is larger, and if the actor dies in between, it
takes some of the blocks from the first run and others from the second, which are not cut at the same rows.
Then rows are in the output twice, or missing. That happens to everything that is not exactly repeatable. So
for large answers use small blocks, or set ``target_max_block_size`` to ``None``: then nothing is cut.

**How much is in flight.** In each actor Ray runs one task at a time, and of that four batches at once
(``RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY``), which makes four times ``batch_size`` at most;
``max_concurrency`` among the arguments of ``map_batches`` makes it more tasks. Within that,
``BatchConfig.in_flight`` holds for each actor, and `PredictorConfig.total_in_flight` for all together.

**The totals** are kept by one more actor, the governor, which the first predictor starts and for which no
CPU is reserved. It grants permits in blocks, and wants those back that are more than a predictor's share. Of
a predictor that dies it learns from Ray, within some seconds, and only then do others get what that one had:
so there is never more in flight than the total. If the governor's own machine is lost, the dataset fails with
Ray's ``ActorDiedError``. It ends a minute after its last predictor.
"""

from ._predictor import AgentPredictor, OnError, PredictorConfig, PromptFailed

__all__ = ["AgentPredictor", "OnError", "PredictorConfig", "PromptFailed"]
