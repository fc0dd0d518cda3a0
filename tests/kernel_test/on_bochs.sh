#!/usr/bin/env bash
# kernel_test on an emulated processor with AVX-512, its VNNI and its BF16, for machines without; the instructions of AMX are
# trapped there (tile_traps.h), for Linux and this emulator do not agree about them.
#
#   tests/kernel_test/on_bochs.sh WORK      a folder to build in; exits as kernel_test does
#
# Bochs boots a kernel of Debian's whose only program is the test. Needs python with torch, pybind11, cmake, ninja, and of Debian
# 13: apt-get install bochs bochsbios vgabios isolinux syslinux-common xorriso cpio busybox-static
set -euo pipefail
root=$(realpath "$(dirname "$0")/../..")
mkdir -p "${1:?"usage: tests/kernel_test/on_bochs.sh WORK"}"
cd "$1"

torch_dir=$(python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
cmake -G Ninja -S "$root" -B build "-DPython3_EXECUTABLE=$(command -v python)" "-DSADMOE_TORCH_DIR=$torch_dir" -DSADMOE_CUDA=OFF \
  -DSADMOE_KERNEL_TEST=ON "-DCMAKE_CXX_FLAGS=-include $root/tests/kernel_test/bf16_by_halves.h" >configured.txt
cmake --build build -t kernel_test

if ! ls boot/vmlinuz* >/dev/null 2>&1; then
  image=$(apt-cache depends linux-image-cloud-amd64 | grep -o 'linux-image-[0-9].*')
  apt-get download "$image"
  dpkg --fsys-tarfile linux-image-*.deb | tar -xf - ./boot
fi

rm -rf files disc
mkdir -p files/{bin,proc,lib64,lib/x86_64-linux-gnu,dev} disc/isolinux
cp build/kernel_test files/
cp "$(command -v busybox)" files/bin/
cp -L $(ldd build/kernel_test | grep -o '/lib/x86_64-linux-gnu/[^ ]*') files/lib/x86_64-linux-gnu/
cp -L /lib64/ld-linux-x86-64.so.2 files/lib64/
mknod files/dev/console c 5 1
cat >files/init <<'END'
#!/bin/busybox sh
/kernel_test
echo "kernel_test ended with $?"
/bin/busybox poweroff -f
END
chmod +x files/init
(cd files && find . | cpio -o -H newc --quiet | gzip -1) >disc/files.gz
cp boot/vmlinuz* disc/vmlinuz
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 disc/isolinux/
cat >disc/isolinux/isolinux.cfg <<'END'
SERIAL 0 115200
DEFAULT test
LABEL test
KERNEL /vmlinuz
INITRD /files.gz
APPEND console=ttyS0,115200 quiet rdinit=/init no5lvl clearcpuid=amx_tile,amx_bf16,amx_int8 nosmap noapic tsc=unstable mitigations=off
END
xorriso -as mkisofs -quiet -o disc.iso -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table disc
cat >bochsrc <<'END'
cpu: model=sapphire_rapids, count=1, ignore_bad_msrs=1
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
display_library: rfb, options="timeout=0"
boot: cdrom
ata0-master: type=cdrom, path=disc.iso, status=inserted
com1: enabled=1, mode=file, dev=said.txt
log: bochs.txt
panic: action=fatal
error: action=report
END
bochs -q -f bochsrc >screen.txt 2>&1 || true # it takes the power off for a failure
grep -a -v '^\[\|^$\|^ISOLINUX' said.txt | tr -d '\r'
exit "$(grep -a -o 'kernel_test ended with [0-9]*' said.txt | grep -o '[0-9]*$' || echo 99)"
