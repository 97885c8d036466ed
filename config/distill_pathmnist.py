"""Distillation on PathMNIST: a large teacher into a small student (paper section 3.4, Table 12).

    torchrun --standalone --nproc_per_node=2 distill.py config/distill_pathmnist.py \
        --distilled_model_type=facebook/dinov2-large --model_type=facebook/dino-vits16

The budget is that of config/pathmnist.py. The paper's teachers are gated and need timm:
--distilled_model_type=timm:hf_hub:prov-gigapath/prov-gigapath, or timm:hf_hub:MahmoodLab/UNI. For
the paper's other strategies add --use_lora=true, or --freeze_backbone_layers=6. A teacher of a
billion parameters costs more than the student: --fixed_views=8 --teacher_cache=FOLDER computes its
features only once. We have not run this file on a GPU yet, so there is no number to expect.
"""
model_name = 'distill_pathmnist'
dataset_path = 'pathmnist'
dataset_size = 224
model_type = 'facebook/dino-vits16'
distilled_model_type = 'facebook/dinov2-large'
global_crops_size = 224          # a multiple of the student's patch size; the teacher has its own
max_iterations = 2000
