"""interim"""
from flexalign.inra.configuration import InRaConfig
from flexalign.lora_dial.configuration import LoRADialConfig, ADAPTER_FILE, check_folder

def read_dial(folder):
    if (folder / ADAPTER_FILE).is_file():
        return check_folder(folder)
    return InRaConfig.load(folder)
