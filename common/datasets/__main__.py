"""Command line: sort a public archive, as downloaded, into the tree that the programs read.

    python -m common.datasets list
    python -m common.datasets prepare mias DOWNLOADED data/mias

Images are linked, not copied; the download stays as it is. The new folder has train/<class>/ and
test/<class>/, annotations.csv or masks/ where the archive says where lesions are, metadata.csv
(image, label, patient), and manifest.csv, which says of every image where it went, and why.
"""

import argparse
import shlex
from pathlib import Path

from common.cli import run_script
from common.datasets import MEDMNIST_SIZES
from common.datasets.archives import ARCHIVES, Archive
from common.datasets.preparing import BOXES, MASKS, METADATA, Prepared, prepare, summary

NAMED = [name for name in ARCHIVES if not name.endswith(tuple(f"_{n}" for n in MEDMNIST_SIZES))]
"""Those that lists show; MedMNIST+ is each MedMNIST set at further sizes."""
PROGRAM = "python -m common.datasets"
EXAMPLE = f"""example: {PROGRAM} prepare mias ~/Downloads/all-mias data/mias

It prints what it did and the commands to go on with. The same command again changes nothing.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|prepare")
    commands.add_parser("list", help="the archives, what each needs and where to get it")
    command = commands.add_parser(
        "prepare",
        help="sort an archive into train/ and test/ of a new folder, by links",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("name", choices=ARCHIVES, metavar="NAME", help=f"{', '.join(NAMED)}; MedMNIST+ "
        f"with its size behind the name ({NAMED[-1]}_{MEDMNIST_SIZES[0]})")  # fmt: skip
    add("source", type=Path, metavar="SRC", help="folder that the archive was unpacked to")
    add("folder", type=Path, metavar="DST", help="new folder for the links")
    add("--seed", type=int, default=0, metavar="N",
        help="draws which normal patients are tested, where the archive leaves that open "
             "(default: 0)")  # fmt: skip
    add("--official", action="store_true",
        help="keep the archive's own parts as published tables do, even where a patient is in "
             "both (default: such training images are left out)")  # fmt: skip
    return parser.parse_args()


def listed() -> str:
    """The table of archives, a paragraph each."""
    return "\n".join(
        f"{archive.name}: {archive.about}\n    needs {archive.layout}\n    from {archive.obtain}"
        for archive in ARCHIVES.values()
        if archive.name in NAMED
    )


def next_steps(archive: Archive, prepared: Prepared) -> str:
    """Settings for PICARD and flags for DIA that fit the prepared folder."""
    folder = prepared.folder.resolve()
    trained = sorted({p.label for p in prepared.pictures if p.part == "train"})
    quoted = shlex.quote(str(folder))
    flags = f"--dataset {archive.dataset} --data_root {quoted}"
    flags += (
        f" --one_class_idx {trained.index(archive.normal)}" if archive.dataset == "folder" else ""
    )
    lines = []
    if not any(p.member for p in prepared.pictures):
        lines += [
            "PICARD: these settings,",
            f"  dataset_name: {archive.name}",
            f"  train_data_path: {folder / 'train' / archive.normal}",
            f"  test_data_path: {folder / 'test'}",
            "  data_with_subfolder: true",
        ]
        truth = [shlex.quote(str(folder / name)) for name in (BOXES, MASKS)
                 if (folder / name).exists()]  # fmt: skip
        about = f"--metadata {shlex.quote(str(folder / METADATA))}"
        lines += [f"and for eval.py: --annotations {path} {about}" for path in truth]
        if not truth:
            lines.append("(the archive does not say where lesions are: eval.py needs annotations)")
    lines += ["DIA: these flags,", f"  {flags}"]
    return "\n".join(lines)


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "list":
        print(listed())
        return 0
    archive = ARCHIVES[arguments.name]
    prepared = prepare(
        archive.name,
        archive.pictures(arguments.source),
        arguments.source,
        arguments.folder,
        normal=archive.normal,
        seed=arguments.seed,
        official=arguments.official,
    )
    print("\n".join(summary(prepared)))
    print(f"{prepared.folder}: {prepared.new or 'no'} new files and links\n")
    print(next_steps(archive, prepared))
    return 0


if __name__ == "__main__":
    run_script(main, interrupted="Interrupted; the same command goes on.")
