"""transformers' Trainer for routers and adapters: its loss, its steering, its small checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..dial import LARGEST_TAU, SMALLEST_TAU
from ..errors import ValueOutOfRangeError
from ..modeling import FlexiDepthForCausalLM
from .metrics import RunningMetrics, rounded
from .objective import Counts, GateSlopes, RoutingObjective, Weights
from .penalty_start import balancing_penalty
from .steering import BudgetController, PenaltyController

Controller = PenaltyController | BudgetController
SaveRouting = Callable[[FlexiDepthForCausalLM, Path], None]
LoadRouting = Callable[[FlexiDepthForCausalLM, Path], None]
STEERING_FILE = "steering.json"
_INPUTS = ("input_ids", "labels", "position_ids", "attention_mask", "document_ids")


class RoutingTrainer(Trainer):  # type: ignore[misc]
    """Trainer of a RoutingObjective.

    Args:
        model: its base frozen (freeze_base). weights: of the loss. controller: what is steered, None = nothing.
        router_learning_rate: peak for routers, None = as for adapters. save, load: write routers and adapters
        to a checkpoint directory and read them back. Other arguments as for Trainer.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: FlexiDepthForCausalLM,
        args: TrainingArguments,
        *,
        weights: Weights,
        controller: Controller | None,
        router_learning_rate: float | None = None,
        save: SaveRouting,
        load: LoadRouting,
        train_dataset: Dataset[dict[str, Tensor]],
        eval_dataset: Dataset[dict[str, Tensor]] | None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    ) -> None:
        self.network, self.weights, self.controller = model, weights, controller
        self._router_learning_rate = router_learning_rate
        self._save_routing, self._load_routing = save, load
        config = model.config
        self._metrics = RunningMetrics(config.routing_layers, config.num_hidden_layers)
        self._batch = 0
        self._counts: Counts | None = None
        self._tokens, self._since = 0.0, time.monotonic()  # since the last log
        # Of the step, a sequence a row: number of its budget, mean layers skipped, tokens; and slopes.
        self._skipped: list[Tensor] = []
        self._slopes: list[GateSlopes] = []
        # Trainer would spread a batch over the GPUs of one process, where nothing here would follow it.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=RoutingObjective(model),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
        )
        # The loss is averaged over the whole step here, whatever this version of Trainer would do.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.add_callback(_Steering(self))

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """The optimiser of the arguments, with a learning rate of its own for routers."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            trained = [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in trained if ".router." not in n]},
                {"params": [p for n, p in trained if ".router." in n]},
            ]
            if self._router_learning_rate is not None:
                groups[1]["lr"] = self._router_learning_rate
            self.optimizer = kind(groups, **options, weight_decay=self.args.weight_decay)
        made: torch.optim.Optimizer = self.optimizer
        return made

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *rest: Any
    ) -> tuple[list[Any], Any]:
        """The batches of an optimiser step, and how many labels and tokens they have together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, *rest)
        labels = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches))
        tokens = torch.tensor(sum(int((b["document_ids"] >= 0).sum()) for b in batches))
        both = torch.stack([labels, tokens]).double().to(self.args.device)
        # Gradients are averaged over the processes: each divides by its share of all tokens.
        both = self._sum(both) / self.args.world_size
        self._counts = Counts(both[0].float(), both[1].float())
        self._tokens += float(both[1]) * self.args.world_size
        return batches, both[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """RoutingObjective's loss, at the budgets of this step."""
        offset, price, chosen = self._budgets(inputs)
        outputs = model(
            **{name: inputs[name] for name in _INPUTS},
            weights=self.current_weights,
            counts=self._counts,
            gate_offset=offset,
            price=price,
        )
        self._metrics.add(outputs)
        self._batch += 1
        if self.controller is not None:
            mean = outputs["skipped"].sum(-1) / outputs["tokens"].clamp(min=1)
            numbers = torch.tensor(chosen, dtype=mean.dtype, device=mean.device)
            self._skipped.append(torch.stack([numbers, mean], dim=1))
            if isinstance(self.controller, BudgetController):
                self._slopes.append(outputs["slopes"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    @property
    def current_weights(self) -> Weights:
        """Weights of the loss with the steered penalty."""
        if isinstance(self.controller, PenaltyController):
            return Weights(self.weights.lm, self.weights.kl, self.controller.alpha)
        return self.weights

    def start_penalty(self, batch: dict[str, Tensor]) -> None:
        """Let a steered penalty start no lower than where it balances the rest of the loss, on this batch."""
        if not isinstance(self.controller, PenaltyController):
            return
        alpha = torch.tensor(
            balancing_penalty(self.network, batch, self.weights), dtype=torch.float64
        )
        if self.args.world_size > 1:  # one start for all processes
            alpha = broadcast(alpha.to(self.args.device))
        self.controller.begin(max(self.controller.start, float(alpha)))

    def steer(self) -> None:
        """After an optimiser step: the controller takes in what its tokens skipped."""
        if not self._skipped:
            return
        found = torch.cat(self._skipped)
        slopes = found.new_zeros(len(found))
        if self._slopes and self._counts is not None:
            # dL/dw of a mean over all tokens, in units of one
            slopes = torch.cat([own.means() for own in self._slopes]) * self._counts.tokens
        found = torch.cat([found, slopes[:, None]], dim=1)
        if self.args.world_size > 1:
            found = self.accelerator.gather(found)
        self._skipped, self._slopes = [], []
        numbers, means, left = found[:, 0].long().tolist(), found[:, 1].tolist(), found[:, 2]
        if isinstance(self.controller, BudgetController):
            self.controller.update(numbers, means, left.tolist())
        elif self.controller is not None:
            self.controller.update(sum(means) / len(means))

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Figures over the held-out text, at each budget where there are budgets; logged and returned.

        Reading the text draws from torch's generator. It is set back, so that training does not depend on how often it
        is looked at.
        """
        if self.eval_dataset is None:
            raise ValueOutOfRangeError("training: no held-out text to evaluate on; give held_out")
        figures: dict[str, float] = {}
        if isinstance(self.controller, BudgetController) and self.controller.offsets:
            for budget, offset in zip(
                self.controller.budgets, self.controller.offsets, strict=True
            ):
                figures |= self._held_out(f"{metric_key_prefix}_{budget:g}", offset)
        else:
            figures = self._held_out(metric_key_prefix, None)
            if isinstance(self.controller, PenaltyController):
                self.controller.held_out(figures[f"{metric_key_prefix}_layers_skipped"])
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, figures
        )
        return figures

    def _held_out(self, prefix: str, offset: float | None) -> dict[str, float]:
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._held_out_figures(prefix, offset)

    def _held_out_figures(self, prefix: str, offset: float | None) -> dict[str, float]:
        config = self.network.config
        metrics = RunningMetrics(config.routing_layers, config.num_hidden_layers)
        self.model.eval()
        for batch in self.get_eval_dataloader():
            inputs = self._prepare_inputs({name: batch[name] for name in _INPUTS})
            rows = len(inputs["input_ids"])
            gate_offset = (
                None if offset is None else torch.full((rows,), offset, device=self.args.device)
            )
            with self.compute_loss_context_manager():
                metrics.add(
                    self.model(
                        **inputs, weights=self.weights, gate_offset=gate_offset, compare=True
                    )
                )
        self.model.train()
        return {f"{prefix}_{name}": value for name, value in metrics.means(self._sum).items()}

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Trainer's log with our figures since the last one."""
        if "loss" in logs and self._metrics:
            logs |= self._metrics.means(self._sum)
            now = time.monotonic()
            logs["tokens_per_second"] = self._tokens / max(now - self._since, 1e-9)
            self._tokens, self._since = 0.0, now
            if isinstance(self.controller, PenaltyController):
                logs["alpha"] = self.controller.alpha
            elif self.controller is not None and self.controller.offsets:
                pairs = zip(self.controller.budgets, self.controller.offsets, strict=True)
                logs |= {f"offset/{budget:g}": offset for budget, offset in pairs}
                pairs = zip(self.controller.budgets, self.controller.prices, strict=True)
                logs |= {f"price/{budget:g}": price for budget, price in pairs}
        super().log(rounded(logs), *rest, **options)

    def _budgets(self, inputs: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None, list[int]]:
        """gate_offset and price of a batch, and the number of the budget that each sequence is trained at."""
        rows = len(inputs["input_ids"])
        if not isinstance(self.controller, BudgetController):
            return None, None, [0] * rows
        if self.controller.offsets is None:
            self.controller.start(self._logits(inputs))
            if self.args.world_size > 1:  # one start for all processes
                offsets = torch.tensor(self.controller.offsets, device=self.args.device)
                self.controller.offsets = broadcast(offsets).tolist()
        step = (self.state.global_step << 12) + self._batch * self.args.world_size
        chosen = self.controller.choose(rows, step + self.args.process_index, self.args.seed)
        device = self.args.device
        return (
            self.controller.offset(chosen).to(device),
            self.controller.price(chosen).to(device),
            chosen,
        )

    @torch.no_grad()
    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of all gates [tokens, routed layers] with every layer run; float64, trained ones go below -50."""
        names = ("input_ids", "position_ids", "attention_mask")
        out = self.network.model(
            **{name: inputs[name] for name in names}, use_cache=False, force_routing="all"
        )
        gates = out.gates[(inputs["document_ids"] >= 0)]
        return torch.logit(gates.double().clamp(SMALLEST_TAU, LARGEST_TAU))

    def _sum(self, value: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return value
        total: Tensor = self.accelerator.reduce(value.to(self.args.device), reduction="sum")
        return total

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Routers, adapters and the state of the steering: a few megabytes."""
        if not self.args.should_save:  # every process comes here
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # where other processes write beside it
        # Written last, it says that a checkpoint is whole; an older one of this name is so no longer.
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self._save_routing(self.network, folder)
        if self.controller is not None:
            (folder / STEERING_FILE).write_text(json.dumps(self.controller.state_dict()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_routing(self.network, folder)
        if self.controller is not None:
            self.controller.load_state_dict(json.loads((folder / STEERING_FILE).read_text()))


class _Steering(TrainerCallback):  # type: ignore[misc]
    """Steers at the end of every optimiser step, before it is logged or saved."""

    def __init__(self, trainer: RoutingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.steer()
        self.trainer._batch = 0


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's folder: one whose last file was written whole."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and _complete(path):
            found.append((int(number), path))
    return max(found)[1] if found else None


def _complete(path: Path) -> bool:
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
