"""OPSD + PHF in a TRL trainer (in this repository: pip install ".[integrations]").

Rows of the data set: ``student_prompt_ids`` and ``teacher_prompt_ids``, a problem without and with
its reference solution.  LoRA, gradient accumulation, logging and saving are TRL's::

    trainer = PHFTrainer(model, args=SFTConfig(...), train_dataset=rows, processing_class=tokenizer)
    trainer.train()
"""

import copy

from plain_pytorch import phf_loss, sample
from trl import SFTTrainer


class PHFTrainer(SFTTrainer):
    """On-policy self-distillation against the frozen starting weights.

    Means are those of a device's microbatch.
    """

    def __init__(self, model, args, alpha=0.05, max_new_tokens=1024, **kwargs):
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        teacher = copy.deepcopy(model)  # before TRL wraps the model's forward
        super().__init__(model, args=args, data_collator=lambda rows: {"rows": rows}, **kwargs)
        self.alpha, self.max_new_tokens = alpha, max_new_tokens
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sample, then the loss; there are no outputs to return."""
        prompts = [row["student_prompt_ids"] for row in inputs["rows"]]
        privileged = [row["teacher_prompt_ids"] for row in inputs["rows"]]
        responses = self.responses(self.accelerator.unwrap_model(model).eval(), prompts)
        model.train()
        loss = phf_loss(model, self.teacher, prompts, privileged, responses, self.alpha)
        return (loss, {}) if return_outputs else loss

    def responses(self, student, prompts):
        """The student's rollouts."""
        eos, limit = self.processing_class.eos_token_id, self.max_new_tokens
        return sample(student, prompts, eos, max_new_tokens=limit)
