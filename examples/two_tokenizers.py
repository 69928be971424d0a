"""A teacher with another tokenizer: one map between vocabularies, rows that pair, one loss.

    python examples/two_tokenizers.py --steps 20

The student is new, with a tokenizer trained here on a few texts; the teacher is the package's. The
steps are the same for any two models.
"""

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dudi.demo_data import data_path, translation_rows
from dudi_kernels import Aligner, LMHead, Tokens, Verbalizer, linear_distill_loss


def new_tokenizer(texts):
    """Byte-level BPE, as GPT-2's."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>")


def hidden(model, ids):
    """(R, D) the states that predict each token but the first."""
    return model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, :-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    torch.manual_seed(0)
    texts = [row["completion"][0]["content"] for row in translation_rows("train")]
    tokenizer = new_tokenizer(texts)
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    teacher = AutoModelForCausalLM.from_pretrained(data_path("teacher"), dtype=torch.float32)
    teacher_tokenizer = AutoTokenizer.from_pretrained(data_path("teacher"))

    verbalizer = Verbalizer.from_tokenizers(
        teacher_tokenizer,
        tokenizer,
        teacher_size=teacher.config.vocab_size,
        student_size=student.config.vocab_size,
    )
    print(verbalizer.coverage())
    aligner = Aligner(Tokens.of(tokenizer), Tokens.of(teacher_tokenizer))

    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for step in range(args.steps):
        text = texts[step % len(texts)]
        own = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        other = [
            *teacher_tokenizer(text, add_special_tokens=False).input_ids,
            teacher_tokenizer.eos_token_id,
        ]
        found = aligner([own], [other])
        # row i predicts token i; the first token has no state before it here
        pairs = [
            (i - 1, j - 1)
            for i, j in zip(
                found.student_rows[0].tolist(), found.teacher_rows[0].tolist(), strict=True
            )
            if i > 0 and j > 0
        ]
        student_rows, teacher_rows = torch.tensor(pairs).T
        with torch.no_grad():
            taught = hidden(teacher, other)[teacher_rows]
        loss = linear_distill_loss(
            hidden(student, own)[student_rows],
            LMHead.from_model(student),
            taught,
            LMHead.from_model(teacher),
            verbalizer=verbalizer,
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  {len(pairs)} of {len(own) - 1} rows pair  KL {loss.item():.3f}")


if __name__ == "__main__":
    main()
