# A newcomer with a laptop and the README: everything up to "use.py" stands there.

make run
diffexpo run scenes/quick
diffexpo run scenes/expo --set seed=1 --name seed1
diffexpo run --resume runs/seed1
diffexpo config show scenes/expo --sources
diffexpo recipes
diffexpo runs
diffexpo export runs/seed1 --iteration 2
diffexpo estimate paper/expo_sdxl
diffexpo data inspect runs/seed1
diffexpo export runs/seed1
diffexpo report runs/seed1
diffexpo verify runs/seed1
diffexpo doctor

# The report says how the model is used: the code of the export's card, in the export's folder.
sed -n '/^```python/,/^```/p' runs/seed1/export/README.md | sed '/^```/d' > runs/seed1/export/use.py
echo 'image.save("cat.png")' >> runs/seed1/export/use.py
cd runs/seed1/export && python use.py
