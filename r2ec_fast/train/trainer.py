"""The training loop: examples -> rollouts -> rewards -> advantages -> loss -> step -> evaluate.

Departures from the paper and its code, each with a test (all of them: docs/method.md):
- one advantage a trajectory; only the best reasoning(s) of a group train the item action;
- log-probabilities are stored when sampled, at the sampling temperature; token ids travel;
- equal targets of a batch are one candidate, never each other's negatives;
- rewards come from item rows of one age: a step's own targets are not fresher than their rivals;
- rewards come from the update's own forward pass, so that a step runs the policy once, not twice.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from r2ec_fast.config import RecPOConfig
from r2ec_fast.data import Reasonings, RecDataset
from r2ec_fast.eval.metrics import BEST_METRIC
from r2ec_fast.eval.ranking import server_engine, transformers_engine
from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.rollout import RolloutEngine, Rollouts
from r2ec_fast.train import distributed
from r2ec_fast.train.batches import Experience, ItemRows, UserBatch
from r2ec_fast.train.checkpoint import (
    checkpoint_tensors,
    generator_states,
    restore_generators,
    trainable_parameters,
)
from r2ec_fast.train.dynamic_sampling import ResamplingCost, resample_ties, round_key
from r2ec_fast.train.fault_tolerance import together
from r2ec_fast.train.fsdp import gathered, saveable, shard, whole
from r2ec_fast.train.fsdp import wanted as sharding_wanted
from r2ec_fast.train.item_table import CatalogTable
from r2ec_fast.train.logger import RunLog
from r2ec_fast.train.metrics import StepMeter, completion_stats, reasoning_samples
from r2ec_fast.train.optimizer import make_optimizer, make_schedule, resume_schedule
from r2ec_fast.train.run_directory import RunDirectory
from r2ec_fast.train.staleness import MeasuredRefresh
from r2ec_fast.train.step_examples import StepExamples
from r2ec_fast.train.supervised import SupervisedUpdate, reasonings_of
from r2ec_fast.train.validation import Validation

log = logging.getLogger(__name__)


class RecPOTrainer:
    """Trains an :class:`R2ecModel` on a :class:`RecDataset`: RecPO, the contrastive objective, or
    given reasonings, which are those of ``config.reasonings`` or of the argument ``reasonings``.

    ``engine`` samples the reasonings (default: the vLLM server of ``config.rollout_server``, or
    transformers on the model itself); ``on_step`` gets the record of each step, as it is logged.
    Writes ``metrics.jsonl``, ``checkpoint-N/``, ``best/`` and, at the end, ``model/`` (what
    ``Recommender.from_pretrained`` reads) below ``config.output_dir``.

    Raises ValueError for an empty training split, and for reasonings that are missing, do not fit
    the data, or are longer than max_completion_length; OSError where output_dir cannot be written.
    """

    def __init__(
        self,
        model: R2ecModel,
        data: RecDataset,
        config: RecPOConfig,
        *,
        engine: RolloutEngine | None = None,
        reasonings: Reasonings | None = None,
        on_step: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs, set_seed

        if len(data.train) == 0:
            raise ValueError("data: the training split holds no example")
        records = reasonings_of(config, data, reasonings)
        self.output_dir = Path(config.output_dir)
        self.directory = RunDirectory(self.output_dir, config.save_total_limit)
        tracker = None if config.report_to == "none" else config.report_to
        self._sharded = sharding_wanted(config, engine)
        timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout))
        self.accelerator = Accelerator(
            log_with=tracker, project_dir=str(self.output_dir), kwargs_handlers=[timeout]
        )
        set_seed(config.seed)
        self.config, self.data, self.model = config, data, model
        self._on_step = on_step
        self._prepare_model()
        self.builder = model.prompt_builder(data.data.catalog)
        self.assembler = PromptAssembler(self.builder)
        self.examples = StepExamples(data, records, config, self.assembler)
        self.engine = engine or self._default_engine()
        self.update = SupervisedUpdate(model, config)
        self.parameters = trainable_parameters(model)
        self.optimizer = make_optimizer(config, list(self.parameters.values()))
        self.scheduler = make_schedule(config, self.optimizer, self.max_steps)
        self.table = CatalogTable(
            model, self.builder, config, len(data.data.catalog), self.update.budget
        )
        self.refresh = MeasuredRefresh(self.update, self.table)
        self.validation = Validation(
            model, self.assembler, data, config, self.engine, self.update.budget
        )
        self.run_log = RunLog(config, self.accelerator)
        self.step, self.validated_at = 0, -1
        self.best: dict[str, float] = {}
        self.bad_evaluations = 0
        self._stop_signal = self.stopped = False

    def _prepare_model(self) -> None:
        model, config = self.model, self.config
        if config.use_lora and not hasattr(model.backbone, "get_base_model"):
            model.add_lora(r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout)
        if not config.use_lora and not config.train_embeddings:
            # the token tables stay: the loss then needs no gradient of [V, d]
            model.language_model.get_input_embeddings().requires_grad_(False)
            model.language_model.get_output_embeddings().requires_grad_(False)
        if config.gradient_checkpointing:
            model.checkpoint_activations()
        model.to(self.accelerator.device)
        if self._sharded:
            shard(model)

    def _default_engine(self) -> RolloutEngine:
        model, config = self.model, self.config
        if config.rollout_server is not None:
            budget = config.max_tokens_per_microbatch
            return server_engine(model, self.builder, config.rollout_server, max_tokens=budget)
        limit = config.max_tokens_in_flight
        return transformers_engine(model, self.builder, max_tokens_in_flight=limit)

    # ---- the loop -------------------------------------------------------------------------------

    @property
    def max_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.examples.max_steps

    def train(self) -> dict[str, float]:
        """Run to the end (or the early stop); returns the final validation metrics.

        Continues where ``config.resume_from_checkpoint`` says. SIGTERM ends the run after the
        current step with a checkpoint.

        Raises StepOutOfMemory, CheckpointError, RolloutServerError, and PeerError for another
        process of the run; docs/guides/training.md says what each leaves behind.
        """
        self._resume()
        previous = signal.signal(signal.SIGTERM, self._on_sigterm) if _main_thread() else None
        try:
            if self.model.index is None and self.config.trains_items:
                self.table.refresh(self.step)
            if self.step == 0:
                self.validation.check_readiness(self.run_log)
            with self._progress() as bar:
                while not self._stops() and self.step < self.max_steps:
                    if self._loop_body():
                        break
                    bar.update()
            return self._finish()
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            self.accelerator.end_training()

    def _loop_body(self) -> bool:
        """One step with all that is due after it; True = stop early."""
        config = self.config
        self.step += 1
        record = {**self._train_step(self.step), "step": self.step} | self._renew_table()
        if self.step % config.logging_steps == 0:
            self.run_log.write(record)
        if self._on_step is not None:
            self._on_step(record)
        stop = False
        if self._evaluation_due() and self.step < self.max_steps:
            stop = self._validate()
        if config.save_steps and self.step % config.save_steps == 0:
            self._save()
        return stop

    def _train_step(self, step: int) -> dict[str, float]:
        meter = StepMeter()
        users, given = self.examples.of_step(step), self.examples.written
        rows = self.table.candidate_rows(users, step) if self.config.trains_items else {}
        if self.config.fresh_targets:
            self.table.wrote(list(rows), step - 1)
        self.model.train()
        if given is not None:
            written = [given.select(batch.keys) for batch in users]
            record = self.update.reasoning_sft(users, written, rows, self.builder.marker_ids)
            return record | self._optimizer_step() | meter.read(users, [w.values for w in written])
        if self.config.objective == "contrastive":
            record = self.update.contrastive(users, rows, self.builder.marker_ids)
            return record | self._optimizer_step() | meter.read(users, [])
        started = time.perf_counter()
        experiences, cost = self._rollouts(users, rows, step)
        record = {"rollout_time": time.perf_counter() - started} | cost
        for _ in range(self.config.num_iterations):
            record |= self.update.recpo(experiences, rows)
            record |= self._optimizer_step()
        self.refresh.latest = experiences[0], list(rows) if self.config.fresh_targets else []
        every = self.config.log_completions_steps
        if every and step % every == 0:
            titles = self.data.data.catalog.titles
            self.run_log.write_samples(
                reasoning_samples(experiences[0], step, self.model.tokenizer, titles)
            )
        record |= completion_stats(experiences) | self.table.staleness(step)
        return record | meter.read(users, [e.rollouts.values for e in experiences])

    def _rollouts(
        self, users: Sequence[UserBatch], rows: ItemRows, step: int
    ) -> tuple[list[Experience], dict[str, float]]:
        """The step's experiences, and what dynamic sampling cost."""
        rounds, cost = self.config.dynamic_sampling_rounds, ResamplingCost()
        if rounds and self.config.fresh_targets:  # its scores need them before the update does
            self.table.write(list(rows), step - 1)
        experiences = []
        with gathered(self.model), together("rollouts"):
            for batch in users:
                rollouts = self._generate(batch, step)
                if rounds:
                    rollouts = resample_ties(
                        batch,
                        rollouts,
                        update=self.update,
                        generate=lambda part, n: self._generate(part, round_key(step, n)),
                        rounds=rounds,
                        cost=cost,
                    )
                experiences.append(Experience.of(batch, rollouts, self.accelerator.device))
        return experiences, cost.totals() if rounds else {}

    def _generate(self, users: UserBatch, step: int) -> Rollouts:
        config = self.config
        return self.engine.generate(
            users.prompts,
            user_keys=users.keys,
            num_generations=config.num_generations,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=config.seed,
            step=step,
        )

    def _optimizer_step(self) -> dict[str, float]:
        parameters = list(self.parameters.values())
        distributed.sum_gradients(parameters)
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": float(whole(norm)), "learning_rate": learning_rate}

    def _renew_table(self) -> dict[str, float]:
        """What refresh_mode and refresh_steps ask for after a step."""
        if not self.config.trains_items:
            return {}
        if self.table.roll_due():
            self.table.roll(self.step)
        # before the step is logged and saved, so that a resumed run's log is the same
        evaluates = self._evaluation_due() or self.step >= self.max_steps
        return self.refresh(self.step) if evaluates or self.table.refresh_due(self.step) else {}

    def _evaluation_due(self) -> bool:
        every = self.config.eval_steps
        return bool(every) and self.step % every == 0

    # ---- evaluation -----------------------------------------------------------------------------

    def evaluate(
        self, split: str = "valid", *, reasoning: bool | None = None, samples: int | None = None
    ) -> dict[str, float]:
        """Full-catalog ranking of a split: hit_rate, ndcg and mrr at 5, 10, 20.

        Re-encodes the catalog first, so that the table is the model's own. ``reasoning`` defaults
        to the run's ``eval_reasoning``; ``samples`` to ``eval_samples`` (0 = all). Keys are
        ``eval_{split}_ndcg@10`` and so on, ``.../se`` the standard errors; with reasoning and the
        run's ``eval_direct`` also ``eval_{split}_reasoned_minus_direct_ndcg@10``.
        """
        reasoning = self.config.reasons if reasoning is None else reasoning
        if self.table.refreshed_at != self.step:
            self.table.refresh(self.step)
        samples = self.config.eval_samples if samples is None else samples
        return self.validation.metrics(split, reasoning=reasoning, samples=samples)

    def _validate(self) -> bool:
        """Evaluate, keep the best checkpoint; True = patience is over."""
        metrics = self.evaluate("valid")
        self.run_log.write({"step": self.step, **metrics, **self.validation.groups()})
        self.validated_at = self.step
        if metrics[BEST_METRIC] > self.best.get(BEST_METRIC, -math.inf):
            self.best, self.bad_evaluations = metrics, 0
            self._save("best")
        else:
            self.bad_evaluations += 1
        patience = self.config.early_stopping_patience
        return bool(patience) and self.bad_evaluations >= patience

    def _finish(self) -> dict[str, float]:
        if self.stopped:
            self._save()
            log.info("stopped by SIGTERM after step %d; the run can be resumed", self.step)
            return {}
        if self.validated_at != self.step:
            self._validate()
        self._save()
        metrics = self.best
        self.accelerator.wait_for_everyone()
        if self.config.load_best_model_at_end:
            self.directory.load_best(self.model)
            self.table.refreshed_at = self.step
        else:
            metrics = self.evaluate("valid")
        with saveable(self.model), together("export"):
            if self.accelerator.is_main_process:
                self.model.save_pretrained(self.output_dir / "model", self.data.data.catalog)
        self.accelerator.wait_for_everyone()
        return metrics

    # ---- checkpoints and logs -------------------------------------------------------------------

    def _state(self) -> dict:
        budget = self.update.budget
        return {
            "step": self.step,
            "best": self.best,
            "bad_evaluations": self.bad_evaluations,
            "refreshed_at": self.table.refreshed_at,
            "written_at": torch.from_numpy(self.table.written_at),
            "validated_at": self.validated_at,
            "scheduler": self.scheduler.state_dict(),
            "token_budget": budget.tokens if budget.lowered else None,
            "config": self.config.to_dict(),
            **generator_states(),
        }

    def _save(self, name: str | None = None) -> None:
        state, tensors = self._state(), checkpoint_tensors(self.model, self.optimizer)
        name = name or f"checkpoint-{self.step}"
        self.directory.save(name, tensors, self.model.index, state)

    def _resume(self) -> None:
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            self.directory.begin()
            self.run_log.open(None)
            return
        settings = self.config.to_dict()
        state = self.directory.resume(wanted, self.model, self.optimizer, settings)
        restore_generators(state)
        resume_schedule(self.scheduler, self.optimizer, state["scheduler"])
        self.step, self.bad_evaluations = state["step"], state["bad_evaluations"]
        if state["token_budget"] is not None:
            self.update.budget.lower(state["token_budget"])
        self.table.written_at = state["written_at"].numpy()
        self.table.refreshed_at, self.validated_at = state["refreshed_at"], state["validated_at"]
        self.best = self.directory.best_so_far(state["best"], wanted)
        self.run_log.open(self.step)
        log.info("resumed after step %d", self.step)

    def _progress(self) -> tqdm:
        # disable=None: shown on a terminal only
        hidden = None if self.accelerator.is_main_process else True
        title = f"train ({self.config.objective})"
        return tqdm(total=self.max_steps, initial=self.step, desc=title, disable=hidden)

    def _stops(self) -> bool:
        """Whether any process was told to end, the same answer on all."""
        self.stopped = distributed.any_(self._stop_signal)
        return self.stopped

    def _on_sigterm(self, *_: object) -> None:
        self._stop_signal = True


def _main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
