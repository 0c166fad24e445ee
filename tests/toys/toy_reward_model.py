"""Train the tiny reward model of configs/summarise.yaml: 1 for a text that ends with a full stop, else 0.

    python tests/toys/toy_reward_model.py [OUT_DIR]
"""  # fmt: skip

from __future__ import annotations

import random
import sys

import torch
from toy import task
from toy_training import make_tokenizer
from transformers import Qwen2Config, Qwen2ForSequenceClassification

OUT_DIR = "configs/data/toy_reward_model"


def main(directory: str) -> None:
    """Train and save it; half a minute on one core."""
    tokenizer = make_tokenizer(task().texts)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(0)
    letters = [chr(code) for code in range(32, 127)]
    for step in range(200):
        texts = ["".join(draw.choices(letters, k=draw.randint(1, 60))) + draw.choice(["", "."]) for _ in range(32)]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        target = torch.tensor([float(text.endswith(".")) for text in texts])
        loss = torch.nn.functional.mse_loss(model(**inputs).logits[:, 0], target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else OUT_DIR)
