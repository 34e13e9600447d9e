"""Writes block_masks.tsv: what PyTorch's create_block_mask says of the book's masks. Only needed to write it again.

    python3 09_block_sparse/reference/block_masks.py > 09_block_sparse/reference/block_masks.tsv

A row's picture has a character for each block, rows of blocks parted by a slash: # full, o partial, . empty.
"""
import torch
from torch.nn.attention.flex_attention import create_block_mask

documents = torch.repeat_interleave(torch.arange(3), torch.tensor([300, 500, 224]))
MASKS = {
    "causal": lambda b, h, q, kv: kv <= q,
    "window:256": lambda b, h, q, kv: (q - kv >= 0) & (q - kv < 256),
    "window:200": lambda b, h, q, kv: (q - kv >= 0) & (q - kv < 200),
    "window:257": lambda b, h, q, kv: (q - kv >= 0) & (q - kv < 257),
    "dilated:3:200": lambda b, h, q, kv: (q - kv >= 0) & (q - kv < 600) & ((q - kv) % 200 == 0),
    "prefix:300": lambda b, h, q, kv: (kv < 300) | (kv <= q),
    "local-global:128:64": lambda b, h, q, kv: ((q - kv).abs() < 128) | (kv < 64) | (q < 64),
    "documents:300,500,224": lambda b, h, q, kv: (documents[q] == documents[kv]) & (kv <= q),
}

print(f"# create_block_mask(mask_mod, None, None, 1024, 1024, BLOCK_SIZE=block), PyTorch {torch.__version__} on a CPU.")
print("mask\ttokens\tblock\tfull\tpartial\tpicture")
for name, mask_mod in MASKS.items():
    for block in (64, 128):
        mask = create_block_mask(mask_mod, None, None, 1024, 1024, device="cpu", BLOCK_SIZE=block)
        blocks = 1024 // block
        picture = [["."] * blocks for _ in range(blocks)]
        for counts, indices, mark in (
            (mask.kv_num_blocks, mask.kv_indices, "o"),
            (mask.full_kv_num_blocks, mask.full_kv_indices, "#"),
        ):
            for i in range(blocks):
                for j in indices[0, 0, i, : counts[0, 0, i]].tolist():
                    picture[i][j] = mark
        full, partial = int(mask.full_kv_num_blocks.sum()), int(mask.kv_num_blocks.sum())
        print(name, 1024, block, full, partial, "/".join("".join(row) for row in picture), sep="\t")
