"""The works that this package is built from or that a run may use: one entry each, and how it is printed.
Imports without torch.

Authors are written as in BibTeX: joined by " and ", "others" for the rest, braces around a body that is not a
person. A year or an identifier that is not known is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffexpo import __version__

JOURNALS = ("TMLR", "IEEE Transactions on Image Processing")
# Characters of names and titles that BibTeX without UTF-8 cannot read.
TEX = str.maketrans(
    {"ü": r"{\"u}", "ö": r"{\"o}", "é": r"{\'e}", "&": r"\&", "_": r"\_", "%": r"\%"}
    | {"α": r"$\alpha$", "Σ": r"$\Sigma$"}
)


@dataclass(frozen=True)
class Work:
    """One paper, data set or program. `venue` is where it was published, empty for a preprint or a web
    page."""

    key: str
    authors: str
    title: str
    year: int | None = None
    venue: str = ""
    arxiv: str = ""
    url: str = ""
    note: str = ""


def readable(work: Work) -> str:
    """One line: authors (year). Title. Venue, arXiv identifier or address.

    Args:
        work: What is cited.
    Returns:
        For example "Ho and Salimans (2022). Classifier-Free Diffusion Guidance. arXiv 2207.12598."
    """
    head = short_authors(work.authors) + (f" ({work.year})" if work.year else "")
    parts = [work.venue, f"arXiv {work.arxiv}" if work.arxiv else "", work.url, work.note]
    places = ", ".join(part for part in parts if part)
    return f"{head.removesuffix('.')}. {work.title}." + (f" {places}." if places else "")


def short_authors(authors: str) -> str:
    """Family names: all of one or two authors, the first of more with "et al."."""
    names = [_family(name) for name in authors.split(" and ")] if not authors.startswith("{") else [authors]
    names = [name.strip("{}") for name in names]
    if len(names) > 2 or names[-1] == "others":
        return f"{names[0]} et al."
    return " and ".join(names)


def bibtex(work: Work) -> str:
    """The work as a BibTeX entry.

    Args:
        work: What is cited.
    Returns:
        `@article` for a journal, `@inproceedings` for a conference, else `@misc`; braces are balanced and the
        title keeps its capitals.
    """
    kind, place = "misc", ""
    if work.venue:
        kind, place = ("article", "journal") if work.venue in JOURNALS else ("inproceedings", "booktitle")
    fields = {
        "author": work.authors.translate(TEX),
        "title": f"{{{work.title.translate(TEX)}}}",
        place: work.venue,
        "year": str(work.year or ""),
        "eprint": work.arxiv,
        "archivePrefix": "arXiv" if work.arxiv else "",
        "url": work.url or (f"https://arxiv.org/abs/{work.arxiv}" if work.arxiv else ""),
        "note": work.note.translate(TEX),
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if name and value]
    return "\n".join([f"@{kind}{{{work.key},", *lines, "}"])


def _family(name: str) -> str:
    return name.partition(",")[0] if "," in name else name.split()[-1]


_WORKS = (
    Work(
        "diffexpo",
        "{The diffexpo authors}",
        "diffexpo: online preference alignment of text-to-image diffusion and flow-matching models",
        note=f"version {__version__}",
    ),
    # ---- methods on pairs ----------------------------------------------------------------------------------
    Work(
        "zhan_expo",
        "Tianyu Zhan",
        "Aligning Diffusion Models with Online Preference Learning",
        note="New York University",
    ),
    Work(
        "zhan_online_rlhf",
        "Vincent Tianyu Zhan",
        "Online RLHF for Diffusion Model",
        note="proposal, New York University",
    ),
    Work(
        "wallace2024diffusiondpo",
        "Bram Wallace and Meihua Dang and Rafael Rafailov and Linqi Zhou and Aaron Lou and Senthil "
        "Purushwalkam and "
        "Stefano Ermon and Caiming Xiong and Shafiq Joty and Nikhil Naik",
        "Diffusion Model Alignment Using Direct Preference Optimization",
        2024,
        venue="CVPR",
        arxiv="2311.12908",
    ),
    Work(
        "xiong2024iterative",
        "Wei Xiong and Hanze Dong and Chenlu Ye and Ziqi Wang and Han Zhong and Heng Ji and Nan Jiang and "
        "Tong Zhang",
        "Iterative Preference Learning from Human Feedback: Bridging Theory and Practice for RLHF under "
        "KL-Constraint",
        2024,
        venue="ICML",
        arxiv="2312.11456",
    ),
    Work(
        "chen2025sepopo",
        "Mingyu Chen and Yiding Chen and Wen Sun and Xuezhou Zhang",
        "Avoiding exp(R_max) scaling in RLHF through Preference-based Exploration",
        2025,
        arxiv="2502.00666",
    ),
    Work(
        "improvement_model",
        "{Anonymous authors}",
        "Iterative DPO with an Improvement Model for Fine-tuning Diffusion Models",
        note="under double-blind review",
    ),
    Work(
        "brooks2023instructpix2pix",
        "Tim Brooks and Aleksander Holynski and Alexei A. Efros",
        "InstructPix2Pix: Learning to Follow Image Editing Instructions",
        2023,
        venue="CVPR",
        arxiv="2211.09800",
    ),
    Work(
        "yuan2024spin",
        "Huizhuo Yuan and Zixiang Chen and Kaixuan Ji and Quanquan Gu",
        "Self-Play Fine-Tuning of Diffusion Models for Text-to-Image Generation",
        2024,
        venue="NeurIPS",
        arxiv="2402.10210",
    ),
    Work(
        "hong2024mapo",
        "Jiwoo Hong and Sayak Paul and Noah Lee and Kashif Rasul and James Thorne and Jongheon Jeong",
        "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
        2024,
        arxiv="2406.06424",
    ),
    # ---- losses on a pair's logit --------------------------------------------------------------------------
    Work(
        "zhao2023slic",
        "Yao Zhao and Rishabh Joshi and Tianqi Liu and Misha Khalman and Mohammad Saleh and Peter J. Liu",
        "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        2023,
        arxiv="2305.10425",
    ),
    Work(
        "azar2024ipo",
        "Mohammad Gheshlaghi Azar and Zhaohan Daniel Guo and Bilal Piot and Remi Munos and Mark Rowland and "
        "Michal Valko and "
        "Daniele Calandriello",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        2024,
        venue="AISTATS",
        arxiv="2310.12036",
    ),
    Work(
        "mitchell2023cdpo",
        "Eric Mitchell",
        "A note on DPO with noisy preferences & relationship to IPO",
        2023,
        url="https://ericmitchell.ai/cdpo.pdf",
    ),
    Work(
        "chowdhury2024robust",
        "Ray Chowdhury, Sayak and Anush Kini and Nagarajan Natarajan",
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        2024,
        venue="ICML",
        arxiv="2403.00409",
    ),
    Work(
        "meng2024simpo",
        "Yu Meng and Mengzhou Xia and Danqi Chen",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        2024,
        venue="NeurIPS",
        arxiv="2405.14734",
    ),
    Work(
        "fu2025sdpo",
        "Minghao Fu and Guo-Hua Wang and Tianyu Cui and Qing-Guo Chen and Zhao Xu and Weihua Luo and Kaifu "
        "Zhang",
        "Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models",
        2025,
        arxiv="2511.03317",
    ),
    Work(
        "simpletuner",
        "{SimpleTuner contributors}",
        "SimpleTuner",
        url="https://github.com/bghira/SimpleTuner",
    ),
    # ---- methods on scored images --------------------------------------------------------------------------
    Work(
        "dong2023raft",
        "Hanze Dong and Wei Xiong and Deepanshu Goyal and Yihan Zhang and Winnie Chow and Rui Pan and Shizhe "
        "Diao and "
        "Jipeng Zhang and Kashun Shum and Tong Zhang",
        "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment",
        2023,
        arxiv="2304.06767",
    ),
    Work(
        "li2024diffusionkto",
        "Shufan Li and Konstantinos Kallidromitis and Akash Gokul and Yusuke Kato and Kazuki Kozuka",
        "Aligning Diffusion Models by Optimizing Human Utility",
        2024,
        venue="NeurIPS",
        arxiv="2404.04465",
    ),
    Work(
        "peters2007rwr",
        "Jan Peters and Stefan Schaal",
        "Reinforcement Learning by Reward-Weighted Regression for Operational Space Control",
        2007,
        venue="ICML",
    ),
    Work(
        "lee2023aligning",
        "Kimin Lee and Hao Liu and Moonkyung Ryu and Olivia Watkins and Yuqing Du and Craig Boutilier and "
        "Pieter Abbeel and "
        "Mohammad Ghavamzadeh and Shixiang Shane Gu",
        "Aligning Text-to-Image Models using Human Feedback",
        2023,
        arxiv="2302.12192",
    ),
    Work(
        "zheng2026diffusionnft",
        "Kaiwen Zheng and Huayu Chen and Haotian Ye and Haoxiang Wang and Qinsheng Zhang and Kai Jiang and "
        "Hang Su and "
        "Stefano Ermon and Jun Zhu and Ming-Yu Liu",
        "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        2026,
        venue="ICLR",
        arxiv="2509.16117",
    ),
    Work(
        "xue2025awm",
        "Shuchen Xue and Chongjian Ge and Shilong Zhang and Yichen Li and Zhi-Ming Ma",
        "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
        2025,
        arxiv="2509.25050",
    ),
    Work(
        "luo2025dgpo",
        "Yihong Luo and Tianyang Hu and Jing Tang",
        "Reinforcing Diffusion Models by Direct Group Preference Optimization",
        2025,
        arxiv="2510.08425",
    ),
    # ---- methods on trajectories ---------------------------------------------------------------------------
    Work(
        "black2024ddpo",
        "Kevin Black and Michael Janner and Yilun Du and Ilya Kostrikov and Sergey Levine",
        "Training Diffusion Models with Reinforcement Learning",
        2024,
        venue="ICLR",
        arxiv="2305.13301",
    ),
    Work(
        "schulman2017ppo",
        "John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov",
        "Proximal Policy Optimization Algorithms",
        2017,
        arxiv="1707.06347",
    ),
    Work(
        "fan2023dpok",
        "Ying Fan and Olivia Watkins and Yuqing Du and Hao Liu and Moonkyung Ryu and Craig Boutilier and "
        "Pieter Abbeel and "
        "Mohammad Ghavamzadeh and Kangwook Lee and Kimin Lee",
        "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models",
        2023,
        venue="NeurIPS",
        arxiv="2305.16381",
    ),
    Work(
        "yang2024d3po",
        "Kai Yang and Jian Tao and Jiafei Lyu and Chunjiang Ge and Jiaxin Chen and Weihan Shen and Xiaolong "
        "Zhu and Xiu Li",
        "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
        2024,
        venue="CVPR",
        arxiv="2311.13231",
    ),
    Work(
        "liang2024spo",
        "Zhanhao Liang and Yuhui Yuan and Shuyang Gu and Bohan Chen and Tiankai Hang and Ji Li and Liang "
        "Zheng",
        "Step-aware Preference Optimization: Aligning Preference with Denoising Performance at Each Step",
        2024,
        arxiv="2406.04314",
    ),
    Work(
        "deng2024prdp",
        "Fei Deng and Qifei Wang and Wei Wei and Tingbo Hou and Matthias Grundmann",
        "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
        2024,
        venue="CVPR",
        arxiv="2402.08714",
    ),
    Work(
        "liu2025flowgrpo",
        "Jie Liu and Gongye Liu and Jiajun Liang and Yangguang Li and Jiaheng Liu and Xintao Wang and "
        "Pengfei Wan and "
        "Di Zhang and Wanli Ouyang",
        "Flow-GRPO: Training Flow Matching Models via Online RL",
        2025,
        arxiv="2505.05470",
    ),
    Work(
        "wang2025grpoguard",
        "Jing Wang and Jiajun Liang and Jie Liu and Henglin Liu and Gongye Liu and others",
        "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
        2025,
        arxiv="2510.22319",
    ),
    Work(
        "li2025mixgrpo",
        "Junzhe Li and Yutao Cui and Tao Huang and others",
        "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
        2025,
        arxiv="2507.21802",
    ),
    Work(
        "xue2025dancegrpo",
        "Zeyue Xue and Jie Wu and Yu Gao and Fangyuan Kong and Lingting Zhu and Mengzhao Chen and Zhiheng "
        "Liu and Wei Liu and "
        "Qiushan Guo and Weilin Huang and Ping Luo",
        "DanceGRPO: Unleashing GRPO on Visual Generation",
        2025,
        arxiv="2505.07818",
    ),
    Work(
        "wang2025cps",
        "Feng Wang and Zihao Yu",
        "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching",
        2025,
        arxiv="2509.05952",
    ),
    # ---- models, samplers, guidance, tuning ----------------------------------------------------------------
    Work(
        "ho2020ddpm",
        "Jonathan Ho and Ajay Jain and Pieter Abbeel",
        "Denoising Diffusion Probabilistic Models",
        2020,
        venue="NeurIPS",
        arxiv="2006.11239",
    ),
    Work(
        "song2020ddim",
        "Jiaming Song and Chenlin Meng and Stefano Ermon",
        "Denoising Diffusion Implicit Models",
        2020,
        arxiv="2010.02502",
    ),
    Work(
        "lu2022dpmsolverpp",
        "Cheng Lu and Yuhao Zhou and Fan Bao and Jianfei Chen and Chongxuan Li and Jun Zhu",
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        2022,
        arxiv="2211.01095",
    ),
    Work(
        "liu2022rectifiedflow",
        "Xingchao Liu and Chengyue Gong and Qiang Liu",
        "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        2022,
        arxiv="2209.03003",
    ),
    Work(
        "ho2022guidance",
        "Jonathan Ho and Tim Salimans",
        "Classifier-Free Diffusion Guidance",
        2022,
        arxiv="2207.12598",
    ),
    Work(
        "rombach2022ldm",
        "Robin Rombach and Andreas Blattmann and Dominik Lorenz and Patrick Esser and Björn Ommer",
        "High-Resolution Image Synthesis with Latent Diffusion Models",
        2022,
        venue="CVPR",
        arxiv="2112.10752",
    ),
    Work(
        "podell2023sdxl",
        "Dustin Podell and Zion English and Kyle Lacey and Andreas Blattmann and Tim Dockhorn and Jonas "
        "Müller and Joe Penna and "
        "Robin Rombach",
        "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
        2023,
        arxiv="2307.01952",
    ),
    Work(
        "esser2024sd3",
        "Patrick Esser and Sumith Kulal and Andreas Blattmann and Rahim Entezari and Jonas Müller and Harry "
        "Saini and Yam Levi and "
        "Dominik Lorenz and Axel Sauer and Frederic Boesel and others",
        "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
        2024,
        venue="ICML",
        arxiv="2403.03206",
    ),
    Work(
        "chen2023pixartalpha",
        "Junsong Chen and Jincheng Yu and Chongjian Ge and Lewei Yao and Enze Xie and Yue Wu and Zhongdao Wang "
        "and James Kwok and Ping Luo and Huchuan Lu and Zhenguo Li",
        "PixArt-α: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis",
        2024,
        venue="ICLR",
        arxiv="2310.00426",
    ),
    Work(
        "chen2024pixartsigma",
        "Junsong Chen and Chongjian Ge and Enze Xie and Yue Wu and Lewei Yao and Xiaozhe Ren and Zhongdao Wang "
        "and Ping Luo and Huchuan Lu and Zhenguo Li",
        "PixArt-Σ: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image Generation",
        2024,
        venue="ECCV",
        arxiv="2403.04692",
    ),
    Work(
        "xie2024sana",
        "Enze Xie and Junsong Chen and Junyu Chen and Han Cai and Haotian Tang and Yujun Lin and Zhekai Zhang "
        "and Muyang Li and Ligeng Zhu and Yao Lu and Song Han",
        "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers",
        2025,
        venue="ICLR",
        arxiv="2410.10629",
    ),
    Work(
        "xie2025sana15",
        "Enze Xie and Junsong Chen and Yuyang Zhao and Jincheng Yu and Ligeng Zhu and Chengyue Wu and Yujun Lin "
        "and Zhekai Zhang and Muyang Li and Junyu Chen and Han Cai and Bingchen Liu and Daquan Zhou and Song Han",
        "SANA 1.5: Efficient Scaling of Training-Time and Inference-Time Compute in Linear Diffusion Transformer",
        2025,
        venue="ICML",
        arxiv="2501.18427",
    ),
    Work(
        "flux2024",
        "{Black Forest Labs}",
        "FLUX",
        2024,
        url="https://github.com/black-forest-labs/flux",
    ),
    Work(
        "hu2021lora",
        "Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and Yuanzhi Li and Shean Wang "
        "and Lu Wang and "
        "Weizhu Chen",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        2021,
        arxiv="2106.09685",
    ),
    # ---- rewards, data, metrics ----------------------------------------------------------------------------
    Work(
        "radford2021clip",
        "Alec Radford and Jong Wook Kim and Chris Hallacy and Aditya Ramesh and Gabriel Goh and Sandhini "
        "Agarwal and "
        "Girish Sastry and Amanda Askell and Pamela Mishkin and Jack Clark and Gretchen Krueger and Ilya "
        "Sutskever",
        "Learning Transferable Visual Models From Natural Language Supervision",
        2021,
        arxiv="2103.00020",
    ),
    Work(
        "kirstain2023pickapic",
        "Yuval Kirstain and Adam Polyak and Uriel Singer and Shahbuland Matiana and Joe Penna and Omer Levy",
        "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation",
        2023,
        venue="NeurIPS",
        arxiv="2305.01569",
    ),
    Work(
        "wu2023hpsv2",
        "Xiaoshi Wu and Yiming Hao and Keqiang Sun and Yixiong Chen and Feng Zhu and Rui Zhao and Hongsheng "
        "Li",
        "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image "
        "Synthesis",
        2023,
        arxiv="2306.09341",
    ),
    Work(
        "xu2023imagereward",
        "Jiazheng Xu and Xiao Liu and Yuchen Wu and Yuxuan Tong and Qinkai Li and Ming Ding and Jie Tang and "
        "Yuxiao Dong",
        "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
        2023,
        venue="NeurIPS",
        arxiv="2304.05977",
    ),
    Work(
        "schuhmann2022laion",
        "Christoph Schuhmann and Romain Beaumont and Richard Vencu and Cade Gordon and Ross Wightman and "
        "Mehdi Cherti and others",
        "LAION-5B: An open large-scale dataset for training next generation image-text models",
        2022,
        venue="NeurIPS",
        arxiv="2210.08402",
    ),
    Work(
        "zhang2020bertscore",
        "Tianyi Zhang and Varsha Kishore and Felix Wu and Kilian Q. Weinberger and Yoav Artzi",
        "BERTScore: Evaluating Text Generation with BERT",
        2020,
        venue="ICLR",
        arxiv="1904.09675",
    ),
    Work(
        "mittal2012brisque",
        "Anish Mittal and Anush Krishna Moorthy and Alan Conrad Bovik",
        "No-Reference Image Quality Assessment in the Spatial Domain",
        2012,
        venue="IEEE Transactions on Image Processing",
    ),
    Work(
        "open_nsfw",
        "{Yahoo}",
        "Open nsfw model",
        url="https://github.com/yahoo/open_nsfw",
    ),
    Work(
        "rapidocr",
        "{RapidAI}",
        "RapidOCR",
        url="https://github.com/RapidAI/RapidOCR",
    ),
    Work(
        "noto_emoji",
        "{Google LLC}",
        "Noto Emoji",
        url="https://github.com/googlefonts/noto-emoji",
        note="Apache-2.0, through emoji-datasource-google 16.0.0",
    ),
    Work(
        "twemoji",
        "{Twitter, Inc. and other contributors}",
        "Twemoji",
        url="https://github.com/twitter/twemoji",
        note="CC-BY-4.0, through emoji-datasource-twitter 16.0.0",
    ),
    Work(
        "cldr",
        "{Unicode, Inc.}",
        "Unicode Common Locale Data Repository (CLDR)",
        url="https://cldr.unicode.org",
        note="Unicode-3.0, through emojibase-data 17.0.0",
    ),
    Work(
        "li2023diffusionclassifier",
        "Alexander C. Li and Mihir Prabhudesai and Shivam Duggal and Ellis Brown and Deepak Pathak",
        "Your Diffusion Model is Secretly a Zero-Shot Classifier",
        2023,
        venue="ICCV",
        arxiv="2303.16203",
    ),
    Work(
        "friedman2023vendi",
        "Dan Friedman and Adji Bousso Dieng",
        "The Vendi Score: A Diversity Evaluation Metric for Machine Learning",
        2023,
        venue="TMLR",
        arxiv="2210.02410",
    ),
)
WORKS: dict[str, Work] = {work.key: work for work in _WORKS}
"""Every work by its BibTeX key."""
