"""Read a cache in a training loop of your own: python examples/train_from_cache.py STORE GROUP MODEL [STEPS]

`lic-dist finetune` does this with schedules, ranks, states and exact resumption; here is what it rests on.
"""

import sys

import torch
from torch.utils.data import DataLoader

import lic_dist
from lic_dist.codec.walk import levels
from lic_dist.models.stages import dequantize_z, only_stage


def main(store: str, group: str, model: str, steps: str = "20") -> None:
    cache = lic_dist.LatentCache.open(store)  # a folder, or s3://...
    quantizer = lic_dist.Quantizer(lic_dist.QuantizerRecord.from_json(cache.record_json(group)))
    checkpoint = lic_dist.load_checkpoint(model)
    network = checkpoint.model
    optimizer = torch.optim.Adam(network.g_s.parameters(), lr=2e-5)

    arrays = ("pixels", "latents/z", f"quantized/{group}/k")
    batches = DataLoader(cache.stream(arrays, batch=4, seed=0), batch_size=None)  # shuffled, without end
    for step, batch in zip(range(int(steps)), batches, strict=False):
        with torch.no_grad():  # y_hat = means of the hyper-decoder + levels of the really quantized k
            stage = only_stage(checkpoint.codec, (dequantize_z(network, batch["latents/z"]),))
            k = batch[f"quantized/{group}/k"]
            lanes = k.flatten(0, 1).flatten(1)  # a lane a channel
            level = quantizer.dequantize(lanes, levels(stage, quantizer.record.level_rule))
            y_hat = stage.means + level.view(k.shape)
        x_hat = network.g_s(y_hat)
        loss = torch.nn.functional.mse_loss(x_hat, batch["pixels"].float() / 255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {-10 * torch.log10(loss).item():.2f} dB")


if __name__ == "__main__":
    main(*sys.argv[1:])
