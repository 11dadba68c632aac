# What a borrowed machine with a GPU is asked, from the root of a checkout that has the folder `.card` of
# `card.py prepare`, with wheels of fastcore, anndata and what they need in `.card/.whl`, and an older package in
# `.card/old`, if any:
#     bash .github/scripts/card.sh check     under four minutes: speed of the library, pages, a rehearsal of the run
#     bash .github/scripts/card.sh run SECONDS     the run
# Results go to $OUT.
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site \
    .card/.whl/*.whl || exit
here=.github/scripts; new=/tmp/site:$PWD/$here:$PWD/.card; make="python3 $here/card.py make --cells .card --out $OUT"
speed="timeout 70 python3 $here/card_speed.py --cells .card --out $OUT"
if [ "$1" = run ]; then
    PYTHONPATH=$new timeout $(($2+40)) $make --deadline $2 --tail 75 --workers 14 2>&1 | tee $OUT/run.log
    exit 0
fi
PYTHONPATH=$new $speed --device cpu --name cpu --many 1500 > $OUT/cpu.log 2>&1 &
PYTHONPATH=$new $speed --name new 2>&1 | tail -40
[ -d .card/old ] && PYTHONPATH=/tmp/site:$PWD/.card/old:$PWD/$here $speed --name old --many 3000 2>&1 | tail -20
PYTHONPATH=$new $speed --name full --steps 0 --judge > $OUT/full.log 2>&1 &
sleep 35
PYTHONPATH=$new LIMIT=95 python3 $here/card_pages.py 00d_training,00e_stream,01_autoencoder,04a_requests,05a_model &
PYTHONPATH=$new timeout 110 $make --smoke --deadline 85 --tail 40 --workers 7 --trees 10 --more 0 --tell 15 2>&1 |
    tee $OUT/smoke.log | cut -c1-200 | tail -70
tail -n 5 $OUT/full.log; cut -c1-600 $OUT/cpu.log; grep -h "^===\|^---" $OUT/page_*; rm -f $OUT/*.npz
