#!/usr/bin/env bash
# The seed course: MiniMind2 (104M) from pretrain_hq, sft_512, sft_1024, sft_2048 and dpo, as its tutorial trains it.
# dpo_v1.jsonl is the file that was named dpo.jsonl then; today's dpo.jsonl is another one.
# Needs about 24 GB of jsonl and one 24 GB card; on several cards add --nproc N, on several machines start with torchrun.
set -euo pipefail

mm fetch --preset seed --tokenizer minimind-2 --yes
mm pack data/pretrain_hq.jsonl data/sft_512.jsonl --max-len 512
mm pack data/sft_1024.jsonl data/dpo_v1.jsonl --max-len 1024
mm pack data/sft_2048.jsonl --max-len 2048

mm train pretrain --model minimind2 --data shards/pretrain_hq --batch-tokens 131072
mm train sft --data shards/sft_512
mm train sft --data shards/sft_1024
mm train sft --data shards/sft_2048
mm train dpo --data shards/dpo_v1
mm chat
