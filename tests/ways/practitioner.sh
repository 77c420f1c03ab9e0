# A practitioner: an own checkpoint, prompts, pairs and reward in one folder, and a LoRA in plain diffusers at the end.
# The folder has model/ (diffusers), prompts.txt, unseen.txt, and votes/ with pairs.csv and images.

cat > taste.py <<'PYTHON'
def warm(images, prompts):
    """Higher for images with more red than blue."""
    return (images[:, 0] - images[:, 2]).mean(dim=(1, 2)).tolist()


def bright(images, prompts):
    return images.mean(dim=(1, 2, 3)).tolist()
PYTHON

cat > mine.yaml <<'YAML'
name: mine
model: {path: model}
tuning: {kind: lora, lora: {rank: 4}}
prompts: {source: prompts.txt}
offline: {source: pairs}
explore:
  iterations: 2
  prompts_per_iteration: 4
  images_per_prompt: 2
  sampler: {name: ddim, steps: 3, guidance: 2.0, eta: 1.0}
  negatives: {source: null}
rewards: [{name: warm, type: python, path: "taste.py:warm"}]
algorithm: {type: diffusion_dpo, beta: 200.0}
training: {steps: 2, batch_size: 4, micro_batch_size: 4, learning_rate: 1.0e-3}
evaluation:
  prompts: unseen.txt
  num_prompts: 3
  sampler: {name: ddim, steps: 3, guidance: 2.0}
  judges: [{name: bright, type: python, path: "taste.py:bright"}]
  kl_prompts: 0
  vendi_prompts: 0
  bootstrap: 200
YAML

diffexpo data import votes --to pairs
diffexpo data stats pairs
diffexpo run mine.yaml --dry-run
diffexpo run mine.yaml --name mine
diffexpo runs
diffexpo data export mine pairs.parquet
diffexpo export mine@1
diffexpo rescore mine --to mine-small --set 'rewards=[{name: small, type: jpeg_compressibility}]'
diffexpo run mine.yaml --name more --set tuning.start=runs/mine/export/pytorch_lora_weights.safetensors --stop-after train-1

cat > use.py <<'PYTHON'
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("model", safety_checker=None)
pipeline.load_lora_weights("runs/mine/export", weight_name="pytorch_lora_weights.safetensors")
pipeline("a thing", num_inference_steps=3).images[0].save("thing.png")
PYTHON
python use.py
