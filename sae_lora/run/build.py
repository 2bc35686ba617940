"""SAEs, model and trainer of a pack, built in the same way in all its processes."""

from functools import cached_property

import torch
from torch import Tensor

from sae_lora.common.console import Report, complain, no_report
from sae_lora.common.isolation import Isolation
from sae_lora.config.enums import Method
from sae_lora.config.identity import TRAINING_SAES, step_tokens, train_steps
from sae_lora.config.schema import Config
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import device_of, load_model
from sae_lora.saes.loading import SAEs
from sae_lora.saes.training.activation_buffer import ActivationBuffer
from sae_lora.saes.transcoders import check_readings
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Splice
from sae_lora.splice.kl import Comparison, kl_of
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.distributed import Member, ProcessGroup
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.passes import EACH_ALONE, Passing
from sae_lora.train.reconstruct import ReconstructTrainer, sources_of
from sae_lora.train.trainer import Trainer

_READ = 4
"""Number of sequences on which transcoders are checked."""


class Builder:
    """SAEs, model and trainer of a pack, in the leading process and in its workers.

    Args:
        config: The config of any run of the pack: model, data and batches are the same for all.

        this: This process, if several share the batches.

    Raises:
        ConfigError: If the config needs a GPU and there is none.
    """

    def __init__(self, config: Config, this: Member | None = None) -> None:
        self._this = this
        self.device = device_of(config)
        self.saes = SAEs(read_dimensions(config.model), self.device)
        self._config = config

    @cached_property
    def model(self) -> LanguageModel:
        """The plain model, loaded on first access. The SAEs must be loaded before."""
        this, config = self._this, self._config
        divided_by = this.size if this is not None and this.divides else 1
        model = load_model(config.model, config.train.dtype, self.device, divided_by)
        if divided_by > 1 and config.method.kind not in TRAINING_SAES:
            self.saes.divide(divided_by)
        return model

    def trainer(
        self,
        trainings: Isolation,
        validation_tokens: Tensor,
        processes: ProcessGroup,
        report: Report = no_report,
    ) -> Trainer:
        """Build the trainer of a pack in one of its processes.

        Args:
            trainings: The training state of each run; all students share the model.
            validation_tokens: Held-out tokens `[sequence, pos]`.
            processes: The processes that share the batches.
            report: Called with the stages of the training.
        """
        config, train = self._config, self._config.train
        checked: set[Splice] = set()
        for training in trainings.active:
            student = training.student
            with trainings.only(training):
                before = () if student.is_new else student.before
                unchecked = [splice for splice in before if splice not in checked]
                check_readings(self.model, unchecked, validation_tokens[:_READ])
                checked.update(unchecked)
        comparison = Comparison(Head.of(self.model), train.kl_chunk_tokens)
        evaluate = Evaluator(
            self.model,
            validation_tokens,
            max(1, train.eval_batch_tokens // config.data.context_length),
            comparison,
            0 if self.model.shards else 1e9 * train.eval_cache_gb,
            processes,
            report,
        )
        if config.method.kind is not Method.sae:
            kl, micro_batch = kl_of(comparison, train.kl), train.micro_batch_size
            # Processes that divide the model would have to agree on each proof.
            passing = EACH_ALONE if self.model.shards else Passing.of(train, self.device)
            is_asked_for = Passing.of(train, torch.device("cpu")) != EACH_ALONE  # not by default
            if self.model.shards and is_asked_for and not processes.rank:
                keys = "train.stack, train.compile and train.adapter_products"
                complain("note", f"{keys} have no effect: the model is divided (launcher.shard)")
            return DistillTrainer(self.model, trainings, evaluate, kl, micro_batch, passing)
        students = [training.student for training in trainings.active]
        buffer = ActivationBuffer(
            self.model,
            {
                name: source.streams
                for student in students
                for name, source in sources_of(student).items()
            },
            students[0].splices[0].special,
            config.data.seed,
            max(1, min(train_steps(config), config.method.buffer_tokens // step_tokens(config))),
            report,
        )
        batch = torch.Size([train.batch_size, config.data.context_length])
        return ReconstructTrainer(buffer, batch, self.device, trainings, evaluate)
